"""A two-dimensional model as a flow: how points, grid lines and vectors move through depth or time."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.plotting.style import (
    BLUE,
    CENTIMETER,
    FONT,
    GREY,
    ORANGE,
    color_bar,
    finish,
    new_axes,
    sample_color,
    small_text,
    verbatim,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.tracing import FlowLike

_PANELS = 4
_LONG = 100  # steps of a trajectory that can be followed as a line


@accepts
def grid_points(low: float = -2.0, high: float = 2.0, lines: int = 11, along: int = 61) -> torch.Tensor:
    """Points of a square grid, line by line: the input for `flow_map`, of shape ``(2 * lines * along, 2)``.

    Example:
        >>> grid_points(lines=3, along=5).shape
        torch.Size([30, 2])
    """
    across, fine = torch.linspace(low, high, lines), torch.linspace(low, high, along)
    rows = torch.stack(torch.meshgrid(across, fine, indexing="ij"), -1)
    return torch.cat([rows, rows.flip(-1)]).reshape(-1, 2)


@accepts
def flow_map(flow: FlowLike, ax: Axes | None = None, *, along: int | None = 61, panels: int = _PANELS) -> Axes:
    """Grid lines bending step by step: the flow map of a two-dimensional model through depth.

    Every depth is a panel inside the Axes, all of the same scale.

    Args:
        flow: the flow of a batch from `grid_points`; its states have two numbers where the space does not change.
        ax: where to draw, room for the panels; a new figure when None.
        along: points of one line, as given to `grid_points`; None draws every sample as a point, in the color of its
            place at the input, for any batch of points.
        panels: how many depths are shown, evenly spaced.

    Raises:
        ArgumentError: the states are not two-dimensional, or the batch is no whole number of lines.

    Example:
        >>> import torch, stabkit
        >>> flow = stabkit.iterate(lambda x: x + 0.1 * torch.tanh(x.flip(-1)), grid_points(), 5)
        >>> len(flow_map(flow, panels=4).child_axes)
        4
    """
    states = _planar_states(flow)
    _check_lines(states, along)
    picks = np.unique(np.linspace(0, len(states) - 1, min(panels, len(states))).round().astype(int))
    columns = len(picks) if len(picks) <= 3 else math.ceil(math.sqrt(len(picks)))
    rows = -(-len(picks) // columns)
    ax, font = new_axes(ax, 4 * columns, 4.2 * rows)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    whole = np.concatenate([states[pick][1] for pick in picks])
    center = (whole.max(axis=0) + whole.min(axis=0)) / 2
    half = 0.55 * float(np.ptp(whole, axis=0).max()) or 1.0
    for place, pick in enumerate(picks):
        row, column = divmod(place, columns)
        corner = ((column + 0.1) / columns, 1 - (row + 0.9) / rows)
        panel = ax.inset_axes((*corner, 0.88 / columns, 0.78 / rows))
        small_text(panel, font)
        depth, points = states[pick]
        if along is None:
            panel.scatter(points[:, 0], points[:, 1], c=_angles(states[0][1]), cmap="twilight", s=3, linewidths=0)
        else:
            _lines(panel, points, along)
        panel.set_xlim(center[0] - half, center[0] + half)
        panel.set_ylim(center[1] - half, center[1] + half)
        panel.set_aspect("equal")
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.yaxis.set_major_locator(MaxNLocator(3))
        # one scale needs its numbers once, at the outer panels
        panel.tick_params(labelleft=column == 0, labelbottom=place + columns >= len(picks))
        title = "input" if depth == 0 else f"after {depth} step{'s' if depth > 1 else ''}"
        panel.set_title(title, fontsize=font, pad=2)
    return finish(ax, font, "x₁", "x₂", "Flow map")


def _angles(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Direction of every point from the middle of all."""
    x, y = (points - points.mean(axis=0)).T
    return np.asarray(np.arctan2(y, x))


def _check_lines(states: list[tuple[int, NDArray[np.float64]]], along: int | None) -> None:
    count = len(states[0][1])
    if along is not None and count % along:
        raise ArgumentError(
            f"the batch has {count} points, no multiple of along={along}; use grid_points(), or along=None for points"
        )


@accepts
def animate_flow_map(
    flow: FlowLike, path: str | os.PathLike[str], *, along: int = 61, between: int = 6, per_second: int = 12
) -> Path:
    """The flow map as an animated GIF; between two depths points move on straight lines.

    Args:
        flow: as in `flow_map`.
        path: the file to write, ``.gif``.
        along: points of one line.
        between: frames between two depths.
        per_second: frames a second.

    Raises:
        ArgumentError: the suffix is not ``.gif``, or as in `flow_map`.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ArgumentError(f"path={str(path)!r}; the animation is a .gif")
    states = _planar_states(flow)
    _check_lines(states, along)
    figure = Figure(figsize=(8 * CENTIMETER, 8 * CENTIMETER), dpi=120, layout="constrained")
    ax = figure.subplots()
    whole = np.concatenate([points for _, points in states])
    low, high = whole.min(axis=0), whole.max(axis=0)
    margin = 0.05 * (high - low)

    def frame(index: int) -> list[Any]:
        place, rest = divmod(index, between)
        start, stop = states[place], states[min(place + 1, len(states) - 1)]
        ax.clear()
        _lines(ax, start[1] + (stop[1] - start[1]) * rest / between, along)
        ax.set_xlim(low[0] - margin[0], high[0] + margin[0])
        ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
        ax.set_aspect("equal")
        small_text(ax, FONT)
        finish(ax, FONT, "x₁", "x₂", f"depth {start[0] + rest / between:.1f}")
        return []

    frames = (len(states) - 1) * between + 1
    FuncAnimation(figure, frame, frames=frames).save(path, writer=PillowWriter(fps=per_second))
    return path


@accepts
def vector_field(flow: FlowLike, ax: Axes | None = None, *, step: int = 0) -> Axes:
    """What one step adds to every point of the plane: the field h f(x) = x' - x of a two-dimensional model.

    Args:
        flow: the flow of a batch of points, such as ``grid_points(lines=15, along=15)``.
        ax: where to draw; a new figure when None.
        step: which step.

    Raises:
        ArgumentError: the step does not map the plane to itself.
    """
    source, target = _plane(flow.states[step]), _plane(flow.states[step + 1])
    if source is None or target is None:
        raise ArgumentError(f"step {step} does not map two numbers to two numbers; choose another")
    ax, font = new_axes(ax, 8, 7, margin=0.04)
    change = target - source
    speed = np.hypot(*change.T)
    span = np.ptp(source, axis=0).max() or 1.0
    # the longest arrow is a twelfth of the picture, so that arrows do not cover each other
    scale = max(float(speed.max()), 1e-300) * 12 / span
    arrows = ax.quiver(
        *source.T, *change.T, speed, angles="xy", scale_units="xy", scale=scale, cmap="viridis", width=0.004
    )
    color_bar(ax, arrows, "|x′ − x|", font)
    ax.set_aspect("equal", adjustable="box")
    return finish(ax, font, "x₁", "x₂", f"What {verbatim(_name(flow, step))} adds")


@accepts
def phase_portrait(flow: FlowLike, ax: Axes | None = None, *, samples: int = 40) -> Axes:
    """Trajectories of a recurrent net or an iterated map; in more than two dimensions their two principal directions.

    A circle marks the start of a trajectory, a dot its end.

    Args:
        flow: a flow whose states all have the same size.
        ax: where to draw; a new figure when None.
        samples: trajectories drawn, at most.

    Raises:
        ArgumentError: the states have different sizes, or are not finite.
    """
    sizes = {state.size for state in flow.states[:: max(1, len(flow.states) // 50)]}
    if len(sizes) > 1:
        raise ArgumentError(
            f"the states have {sorted(sizes)} numbers; a portrait needs one space, as in recurrent_flow"
        )
    path = np.stack([_flat(state)[:samples] for state in flow.states])
    if not np.isfinite(path).all():
        broken = int(np.flatnonzero(~np.isfinite(path).all(axis=(1, 2)))[0])
        path = path[:broken]  # from there on there is nothing to draw
        if broken < 2:
            raise ArgumentError("the states are not finite; there is no trajectory to draw")
    ax, font = new_axes(ax, 8, 7)
    names = ("x₁", "x₂")
    if path.shape[-1] == 1:
        path = np.stack([path[:-1, :, 0], path[1:, :, 0]], -1)
        names = ("x(n)", "x(n + 1)")
    elif path.shape[-1] > 2:
        flat = path.reshape(-1, path.shape[-1])
        _, values, directions = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
        share = (values[:2] ** 2).sum() / max((values**2).sum(), 1e-300)
        path = (path - flat.mean(axis=0)) @ directions[:2].T
        names = ("first principal direction", f"second ({share:.0%} together)")
    count, long = path.shape[1], len(path) > _LONG  # long trajectories are clouds: their points say more than lines
    for sample in range(count):
        x, y = path[:, sample].T
        color = sample_color(ax, sample, max(count, 2))
        ax.plot(x, y, color=color, linewidth=0.35 if long else 0.7, alpha=0.6 if long else 0.8)
        if long:
            ax.plot(x, y, ".", color=color, markersize=1.5, markeredgewidth=0)
        ax.plot(x[:1], y[:1], "o", color=color, markersize=3, markerfacecolor="none", markeredgewidth=0.7)
        ax.plot(x[-1:], y[-1:], "o", color=color, markersize=3)
    return finish(ax, font, *names, f"Phase portrait, {len(path) - 1} steps: ○ start, ● end")


def _lines(ax: Axes, points: NDArray[np.float64], along: int) -> None:
    lines = points.reshape(-1, along, 2)
    half = len(lines) // 2
    for place, line in enumerate(lines):
        ax.plot(*line.T, color=BLUE if place < half else ORANGE, linewidth=0.6)
    ax.plot(*points[:1].T, ".", color=GREY, markersize=3)


def _planar_states(flow: FlowLike) -> list[tuple[int, NDArray[np.float64]]]:
    found = [(index, plane) for index, state in enumerate(flow.states) if (plane := _plane(state)) is not None]
    if not all(np.isfinite(points).all() for _, points in found):
        raise ArgumentError("the states are not finite; there is nothing to draw")
    if len(found) < 2:
        sizes = [state.size for state in flow.states[:8]]
        raise ArgumentError(f"the states have {sizes} numbers; this picture needs two states of two numbers each")
    return found


def _plane(state: Any) -> NDArray[np.float64] | None:
    return _flat(state) if state.size == 2 else None


def _flat(state: Any) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = state.flatten().detach().double().cpu().numpy()
    return flat


def _name(flow: FlowLike, step: int) -> str:
    name = str(getattr(flow.steps[step], "name", ""))
    return f"step {step}" if not name or name.isdigit() else name
