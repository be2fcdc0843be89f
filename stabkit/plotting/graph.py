"""The chain of steps with its skips: what a flow looks like as a drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from stabkit.plotting.style import BLUE, CENTIMETER, FONT, GREY, LIGHT, ORANGE
from stabkit.report.tables import middle

if TYPE_CHECKING:
    from stabkit.report import Report, StepReport

_PER_ROW = 8


def graph(report: Report, ax: Axes | None = None) -> Axes:
    """The steps as boxes in reading order, skips as arcs with their coefficient, transitions in grey.

    A box has the name of the step, the method it implements and what follows the addition; the number below is its
    growth in nats.

    Args:
        report: a report.
        ax: where to draw; a new figure, as high as the number of steps needs, when None.
    """
    rows = max(1, -(-len(report.steps) // _PER_ROW))
    columns = min(max(len(report.steps), 1), _PER_ROW)
    if ax is None:
        figure = Figure(figsize=((3.1 * columns + 1) * CENTIMETER, (3.0 * rows + 0.6) * CENTIMETER), dpi=200)
        ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for step in report.steps:
        row, column = divmod(step.index, _PER_ROW)
        _box(ax, column * 1.0, -1.0 * row, step)
        if step.index + 1 < len(report.steps):
            _to_next(ax, row, column)
    ax.set_xlim(-0.55, columns - 0.45)
    ax.set_ylim(-rows + 0.45, 0.62)
    ax.axis("off")
    return ax


def _box(ax: Axes, x: float, y: float, step: StepReport) -> None:
    passing = step.skip is not None and step.skip != 0.0
    edge = GREY if step.kind == "transition" else BLUE
    shape = "round,pad=0.01,rounding_size=0.04"
    ax.add_patch(FancyBboxPatch((x - 0.36, y - 0.2), 0.72, 0.4, shape, facecolor=LIGHT, edgecolor=edge, linewidth=1))
    ax.text(x, y + 0.09, middle(step.name, 16), ha="center", va="center", fontsize=FONT - 1)
    ax.text(x, y - 0.08, middle(step.method, 20), ha="center", va="center", fontsize=FONT - 2.5, color=GREY)
    behind = f", then {step.after[0].removesuffix('Backward0')}" if step.after else ""
    ax.text(x, y - 0.3, f"{step.growth:+.2f}{behind}", ha="center", va="center", fontsize=FONT - 2)
    if passing:
        arc = FancyArrowPatch(
            (x - 0.42, y + 0.05), (x + 0.42, y + 0.05), connectionstyle="arc3,rad=-0.45", arrowstyle="-|>",
            mutation_scale=6, color=ORANGE, linewidth=1, shrinkA=0, shrinkB=0,
        )  # fmt: skip
        ax.add_patch(arc)
        ax.text(x, y + 0.32, f"{step.skip:.3g}", ha="center", va="center", fontsize=FONT - 2, color=ORANGE)


def _to_next(ax: Axes, row: int, column: int) -> None:
    if column + 1 < _PER_ROW:
        _arrow(ax, column + 0.37, column + 0.63, -row)
        return
    right, turn = column + 0.5, -row - 0.45
    ax.plot([right - 0.13, right, right, -0.5, -0.5], [-row, -row, turn, turn, -row - 1], color="black", linewidth=0.8)
    _arrow(ax, -0.5, -0.37, -row - 1)


def _arrow(ax: Axes, start: float, stop: float, y: float) -> None:
    ax.add_patch(
        FancyArrowPatch(
            (start, y),
            (stop, y),
            arrowstyle="-|>",
            mutation_scale=7,
            color="black",
            linewidth=0.8,
            shrinkA=0,
            shrinkB=0,
        )
    )
