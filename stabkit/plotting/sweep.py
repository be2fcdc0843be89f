"""Pictures over training: total growth, growth of every step, and the margin to the stability region."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import accepts
from stabkit.diagnosis import VERDICTS
from stabkit.plotting.style import (
    BLUE,
    DIVERGING,
    GREY,
    ORANGE,
    around_zero,
    color_bar,
    empty,
    end_of,
    finish,
    ink,
    new_axes,
    side_by_side,
)

if TYPE_CHECKING:
    from stabkit.comparison import Comparison, Snapshot

_NAMED = 12  # up to here every checkpoint has its label
_COLORS = {"grows": ORANGE, "broken": ORANGE, "shrinks": BLUE}


@accepts
def total_growth(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Gradient growth through the blocks at every checkpoint, with its interval, in nats.

    Orange points are exploding or chaotic, blue ones vanishing; a cross marks a checkpoint that has no finite growth.

    Args:
        comparison: what `stabkit.comparison.compare` found.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    x = _positions(comparison)
    values = np.array([snapshot.total_growth for snapshot in comparison.snapshots])
    finite = np.isfinite(values)
    ax.axhline(0, color=ink(ax), linewidth=0.6)
    ax.plot(x[finite], values[finite], color=GREY, linewidth=0.8, zorder=2)
    for where, snapshot in zip(x, comparison.snapshots, strict=True):
        if snapshot.report is None or not math.isfinite(snapshot.total_growth):
            ax.plot([where], [0], "x", color=ink(ax), markersize=5, clip_on=False, zorder=4)
            continue
        color = _COLORS.get(VERDICTS[snapshot.report.verdict].tone, GREY)
        ax.plot([where, where], snapshot.report.total_growth_interval, color=color, linewidth=1, zorder=3)
        ax.plot([where], [snapshot.total_growth], ".", color=color, markersize=6, zorder=4)
    _checkpoint_axis(ax, comparison, font)
    return finish(ax, font, None, "total growth (nats)", "Gradient growth")


@accepts
def step_growth(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Growth of every step at every checkpoint, as colors: orange grows, blue shrinks, white keeps its size.

    Args:
        comparison: what `stabkit.comparison.compare` found; without steps that all checkpoints share, the picture
            says so.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 9, 6)
    growth = comparison.growth
    if growth.shape[1] == 0:
        empty(ax, "the checkpoints have\nno steps in common", font)
        ax.set_xticks([])
        return finish(ax, font, "", "", "Growth of every step")
    shown = np.ma.masked_invalid(growth.T)
    image = ax.imshow(shown, aspect="auto", cmap=DIVERGING, norm=around_zero(growth), interpolation="nearest")
    color_bar(ax, image, "growth (nats)", font)
    labels = [snapshot.label for snapshot in comparison.snapshots]
    chosen = sorted({round(i) for i in np.linspace(0, len(labels) - 1, min(len(labels), 6))})
    ax.set_xticks(chosen, [end_of(labels[i], 16) for i in chosen])
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return finish(ax, font, _axis_name(comparison), "step (input at the top)", "Growth of every step")


@accepts
def margin(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """The largest spectral radius of any step at every checkpoint; beyond 1 lies outside the stability region.

    Args:
        comparison: what `stabkit.comparison.compare` found.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    x = _positions(comparison)
    values = np.array([snapshot.largest_radius for snapshot in comparison.snapshots])
    known = np.isfinite(values)
    ax.axhline(1, color=ink(ax), linewidth=0.6)
    ax.plot(x[known], values[known], ".-", color=GREY, linewidth=0.8, markersize=5)
    outside = known & (values > 1)
    ax.plot(x[outside], values[outside], ".", color=ORANGE, markersize=6, zorder=3)
    _checkpoint_axis(ax, comparison, font)
    return finish(ax, font, None, "largest spectral radius", "Margin to the region")


@accepts
def overview(comparison: Comparison) -> Figure:
    """The three pictures side by side."""
    return side_by_side((total_growth, step_growth, margin), comparison)


def _by_step(snapshots: tuple[Snapshot, ...]) -> bool:
    """Whether training steps can be the axis: all known, and each of its own."""
    steps = [snapshot.step for snapshot in snapshots]
    return None not in steps and len(set(steps)) == len(steps)


def _positions(comparison: Comparison) -> np.ndarray:
    if comparison.over_time and _by_step(comparison.snapshots):
        return np.array([snapshot.step for snapshot in comparison.snapshots], dtype=float)
    return np.arange(len(comparison.snapshots), dtype=float)


def _axis_name(comparison: Comparison) -> str:
    names = {snapshot.step_name for snapshot in comparison.snapshots if snapshot.step is not None}
    if comparison.over_time and len(names) == 1:
        name = next(iter(names))
        return "checkpoint" if name == "file name" else name.replace("_", " ")
    return "checkpoint"


def _checkpoint_axis(ax: Axes, comparison: Comparison, font: float | None) -> None:
    ax.set_xlabel(_axis_name(comparison), fontsize=font)
    if comparison.over_time and _by_step(comparison.snapshots):
        ax.xaxis.set_major_locator(MaxNLocator(5))
        return
    labels = [end_of(snapshot.label, 16) for snapshot in comparison.snapshots]
    if len(labels) <= _NAMED:
        ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
