"""The chain of steps with its stages and skips: what a flow looks like as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from stabkit.arguments import accepts
from stabkit.identification import by_step, identify
from stabkit.integrators import GeneralLinearMethod
from stabkit.plotting.style import BLUE, CENTIMETER, FONT, GREEN, GREY, ORANGE, ink, paper, shade, verbatim
from stabkit.report.formats import middle
from stabkit.tracing import Flow

if TYPE_CHECKING:
    from stabkit.report import Report

_PER_ROW = 8
_STAGES = 8  # circles that fit into a box; of more the number is written
_FIELDS = (BLUE, GREEN, "#CC79A7", "#E69F00")  # of Okabe and Ito
_UNIT = 3.1  # centimetres from box to box
_TITLE = 10.5  # centimetres that the title takes
_SUBTITLE = "circles: stages, hollow: implicit; orange: skip; below: growth (nats)"


@dataclass(frozen=True)
class _Node:
    """What is drawn of one step; growth is None where it was not measured."""

    index: int
    name: str
    kind: str
    method: str
    skip: float | None
    after: tuple[str, ...]
    A: Sequence[Sequence[float]]
    fields: tuple[int, ...]
    growth: float | None


@accepts
def graph(result: Report | Flow, ax: Axes | None = None) -> Axes:
    """The steps as boxes in reading order, with the stages inside, skips as lines around them, transitions in grey.

    A box has the name of the step and the method that it implements. A circle is a stage, one evaluation of a field,
    each field in a color of its own; lines join a stage to those that it is computed from, and an implicit stage is
    hollow. The number on a skip is its coefficient, the one below a box its growth in nats, followed by what is applied
    after the addition.

    Args:
        result: a report, or a flow, whose methods are identified here and whose growth is not drawn.
        ax: where to draw; a new figure, as high as the number of steps needs, when None.

    Example:
        >>> import torch, stabkit
        >>> flow = stabkit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), torch.ones(3, 2))
        >>> graph(flow).get_title().splitlines()[0]
        'Flow of 2 steps'
    """
    nodes = _of_flow(result) if isinstance(result, Flow) else _of_report(result)
    rows = max(1, -(-len(nodes) // _PER_ROW))
    columns = min(max(len(nodes), 1), _PER_ROW)
    width, height = max(_UNIT * columns + 1, _TITLE), 3.0 * rows + 1.5
    spare = ((width - 1) / _UNIT - columns) / 2
    if ax is None:
        figure = Figure(figsize=(width * CENTIMETER, height * CENTIMETER), dpi=200)
        ax = figure.add_axes((0.01, 0.01, 0.98, (height - 1.1) / height))
    for node in nodes:
        row, column = divmod(node.index, _PER_ROW)
        _box(ax, float(column), -float(row), node)
        if node.index + 1 < len(nodes):
            _to_next(ax, row, column)
    ax.set_xlim(-0.55 - spare, columns - 0.45 + spare)
    ax.set_ylim(-rows + 0.45, 0.55)
    ax.axis("off")
    count = f"{len(nodes)} step{'' if len(nodes) == 1 else 's'}"
    subtitle = _SUBTITLE if any(node.growth is not None for node in nodes) else _SUBTITLE.rpartition(";")[0]
    ax.set_title(f"Flow of {count}\n{subtitle}", fontsize=FONT - 1)
    return ax


def _of_report(report: Report) -> list[_Node]:
    nothing: Mapping[str, Sequence[Sequence[float]]] = {}
    return [
        _Node(s.index, s.name, s.kind, s.method, s.skip, s.after, (s.tableau or nothing).get("A", ()), s.stage_fields,
              s.growth)
        for s in report.steps
    ]  # fmt: skip


def _of_flow(flow: Flow) -> list[_Node]:
    nodes = []
    for step, found in zip(flow.steps, by_step(identify(flow, checks=False), len(flow.steps)), strict=True):
        # the stages of a method that spans several steps are not those of each
        known = isinstance(found.method, GeneralLinearMethod) and len(found.steps) == 1
        A = found.method.A.tolist() if known and isinstance(found.method, GeneralLinearMethod) else []
        fields = found.method.fields if known and isinstance(found.method, GeneralLinearMethod) else ()
        nodes.append(_Node(step.index, step.name, step.kind, found.name, found.skip, found.after, A, fields, None))
    return nodes


def _box(ax: Axes, x: float, y: float, node: _Node) -> None:
    edge = GREY if node.kind == "transition" else BLUE
    shape = "round,pad=0.01,rounding_size=0.04"
    ax.add_patch(
        FancyBboxPatch((x - 0.36, y - 0.22), 0.72, 0.44, shape, facecolor=shade(ax), edgecolor=edge, linewidth=1)
    )
    drawn = bool(node.fields)
    ax.text(
        x, y + (0.13 if drawn else 0.08), verbatim(middle(node.name, 16)), ha="center", va="center", fontsize=FONT - 1
    )
    height = 0.01 if drawn else -0.08
    ax.text(
        x,
        y + height,
        verbatim(middle(node.method, 22)),
        ha="center",
        va="center",
        fontsize=FONT - 2.5,
        color=ink(ax, 0.7),
    )
    if drawn:
        _stages(ax, x, y - 0.125, node)
    below = [] if node.growth is None else [f"{node.growth:+.2f}".replace("-", "−")]
    below += [f"then {node.after[0].removesuffix('Backward0')}"] if node.after else []
    ax.text(x, y - 0.3, ", ".join(below), ha="center", va="center", fontsize=FONT - 2)
    if node.skip:
        over = [(x - 0.44, y), (x - 0.44, y + 0.31), (x + 0.44, y + 0.31), (x + 0.44, y + 0.12)]
        ax.plot(*zip(*over, strict=True), color=ORANGE, linewidth=1, solid_joinstyle="round", zorder=1)
        _arrow(ax, over[-1], (x + 0.44, y + 0.01), ORANGE)
        ax.text(x, y + 0.375, f"{node.skip:.3g}", ha="center", va="center", fontsize=FONT - 2, color=ORANGE)


def _stages(ax: Axes, x: float, y: float, node: _Node) -> None:
    """Stages in the order of their computation, joined by the entries of A that are not zero."""
    count = len(node.fields)
    if count > _STAGES:
        ax.text(x, y, f"{count} stages", ha="center", va="center", fontsize=FONT - 2.5)
        return
    apart = min(0.16, 0.62 / count)
    places = [x + apart * (i - (count - 1) / 2) for i in range(count)]
    for i, row in enumerate(node.A):
        for j, entry in enumerate(row):
            if entry and j < i:
                bend = "arc3" if j == i - 1 else "arc3,rad=-0.5"
                link = FancyArrowPatch((places[j], y), (places[i], y), connectionstyle=bend, arrowstyle="-",
                                       linewidth=0.6, color=GREY, shrinkA=3, shrinkB=3)  # fmt: skip
                ax.add_patch(link)
    for i, (place, field) in enumerate(zip(places, node.fields, strict=True)):
        color = _FIELDS[field % len(_FIELDS)]
        implicit = any(node.A[i][j] for j in range(i, count))
        ax.plot([place], [y], "o", markersize=4, color=color, markerfacecolor=paper(ax) if implicit else color)


def _to_next(ax: Axes, row: int, column: int) -> None:
    if column + 1 < _PER_ROW:
        _arrow(ax, (column + 0.37, -row), (column + 0.63, -row))
        return
    right, turn = column + 0.5, -row - 0.45
    ax.plot([right - 0.13, right, right, -0.5, -0.5], [-row, -row, turn, turn, -row - 1], color=ink(ax), linewidth=0.8)
    _arrow(ax, (-0.5, -row - 1), (-0.37, -row - 1))


def _arrow(ax: Axes, start: tuple[float, float], stop: tuple[float, float], color: Any = None) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            stop,
            arrowstyle="-|>",
            mutation_scale=6,
            color=ink(ax) if color is None else color,
            linewidth=0.8,
            shrinkA=0,
            shrinkB=0,
        )
    )
