"""Pictures over depth: gradient growth and gradient norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from stabkit.plotting.style import BLUE, GREEN, GREY, ORANGE, finish, new_axes, small_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.report import Report

MANY_STEPS = 12  # up to here the depth axis carries names


def depth_axis(ax: Axes, report: Report, font: float | None) -> None:
    """Names of the steps while they fit, their indices beyond; input on the left."""
    n = len(report.steps)
    ax.set_xlim(-0.7, max(n, 1) - 0.3)
    if 0 < n <= MANY_STEPS:
        ax.set_xticks(range(n), [_end(step.name, 13) for step in report.steps], rotation=60, ha="right")
        for tick in ax.get_xticklabels():
            tick.set_rotation_mode("anchor")
            if font is not None:
                tick.set_fontsize(font - 1)
        ax.set_xlabel("")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("step (input left, output right)", fontsize=font)


def _end(name: str, width: int) -> str:
    """The end of a name, where blocks differ; the beginning is what they share."""
    return name if len(name) <= width else f"…{name[1 - width :]}"


def growth(report: Report, ax: Axes | None = None) -> Axes:
    """Gradient growth of every step as bars, and its sum from the output as a line; both in nats.

    The line has an axis of its own on the right, with the same zero: a single step is small beside the sum of
    many. Transitions are hatched; whiskers are the intervals over samples; a step whose growth is not finite
    has a cross on the zero line and ends the sum.

    Args:
        report: a report.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    values = np.array([step.growth for step in report.steps], dtype=float)
    where = np.arange(len(values))
    finite = np.isfinite(values)
    heights = np.where(finite, values, 0.0)
    bars = ax.bar(
        where, heights, width=0.75, color=[ORANGE if value > 0 else BLUE for value in heights], linewidth=0, zorder=2
    )
    for bar, step in zip(bars, report.steps, strict=True):
        if step.kind == "transition":
            bar.set(hatch="/////", edgecolor="white", linewidth=0)
    _whiskers(ax, report, where, finite)
    if (~finite).any():
        ax.plot(where[~finite], np.zeros((~finite).sum()), "x", color="black", markersize=5, zorder=4, clip_on=False)
    ax.axhline(0, color="black", linewidth=0.6, zorder=3)

    edges = np.arange(len(values) + 1) - 0.5
    total = np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
    right = ax.twinx()
    right.plot(edges, np.where(np.isfinite(total), total, np.nan), color="black", linewidth=1.1, zorder=5)
    right.plot(edges[-1:], total[-1:], ".", color="black", markersize=4, zorder=5)
    _share_zero(ax, right)
    right.set_ylabel("sum from output (nats)", fontsize=font)
    small_text(right, font)
    depth_axis(ax, report, font)
    title = "Gradient growth"
    if (~finite).any():
        title += f" (×: {int((~finite).sum())} not finite)"
    return finish(ax, font, None, "per step (nats)", title)


def _whiskers(ax: Axes, report: Report, where: NDArray[np.int64], finite: NDArray[np.bool_]) -> None:
    ends = np.array([step.growth_interval for step in report.steps], dtype=float).reshape(-1, 2)
    shown = finite & np.isfinite(ends).all(axis=1)
    width = 0.7 if len(where) < 40 else 0.4
    ax.vlines(where[shown], ends[shown, 0], ends[shown, 1], color="#333333", linewidth=width, zorder=4)


def _share_zero(left: Axes, right: Axes) -> None:
    """Set the limits of two y axes so that zero is at one height and neither wastes more than it must."""
    spans = []
    for ax in (left, right):
        low, high = ax.dataLim.intervaly
        low, high = (min(low, 0.0), max(high, 0.0)) if math.isfinite(low + high) else (0.0, 0.0)
        size = high - low or 1.0
        spans.append((low, high, size))
    below = max(-low / size for low, _, size in spans)
    above = max(high / size for _, high, size in spans)
    if below + above == 0:
        below = above = 0.5
    for ax, (_, _, size) in zip((left, right), spans, strict=True):
        ax.set_ylim(-(below + 0.06) * size, (above + 0.06) * size)


def gradients(report: Report, ax: Axes | None = None) -> Axes:
    """The norm of the gradient over depth, on a logarithmic scale.

    Step i is drawn where its source state is, so the line starts at the first state and ends at the last. A norm
    of zero has a triangle on the lower frame, one that is not finite a cross on the upper.

    Args:
        report: a report.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    norms = _norms(report)
    where = np.arange(len(norms)) - 0.5
    shown = np.isfinite(norms) & (norms > 0)
    ax.set_yscale("log")
    ax.plot(where, np.where(shown, norms, np.nan), "-", color=BLUE, linewidth=1.1)
    ax.plot(where[shown], norms[shown], ".", color=BLUE, markersize=4 if len(norms) < 40 else 2.5)
    signs = []
    zero, wild = norms == 0, ~np.isfinite(norms)
    for sign, marker, missing, height in (("▼ zero", "v", zero, 0.03), ("× not finite", "x", wild, 0.97)):
        if missing.any():
            signs.append(sign)
            heights = np.full(missing.sum(), height)
            ax.plot(where[missing], heights, marker, color=ORANGE, markersize=4, transform=ax.get_xaxis_transform())
    _log_limits(ax, norms[shown])
    depth_axis(ax, report, font)
    title = f"Gradient norm ({', '.join(signs)})" if signs else "Gradient norm over depth"
    return finish(ax, font, None, "‖gradient‖", title)


def norms(report: Report, ax: Axes | None = None) -> Axes:
    """Norms of the states and of the gradient over depth, on one logarithmic scale.

    Args:
        report: a report.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    ax.set_yscale("log")
    series = ((_norms(report), BLUE, "-", "gradient"), (_state_norms(report), ORANGE, "--", "state"))
    drawn = [np.empty(0)]
    for values, color, line, label in series:
        shown = np.isfinite(values) & (values > 0)
        where = np.arange(len(values)) - 0.5
        ax.plot(where, np.where(shown, values, np.nan), color=color, linestyle=line, linewidth=1.2, label=label)
        drawn.append(values[shown])
    _log_limits(ax, np.concatenate(drawn))
    ax.legend(fontsize=font, borderpad=0.3, framealpha=0.8)
    depth_axis(ax, report, font)
    return finish(ax, font, None, "norm", "States and gradients over depth")


def _state_norms(report: Report) -> NDArray[np.float64]:
    return np.array([step.state_norm for step in report.steps], dtype=float)


def compare(reports: Mapping[str, Report], ax: Axes | None = None) -> Axes:
    """The gradient norms of several reports over depth, each divided by its norm at the output.

    Args:
        reports: reports by the names they get in the legend.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    ax.set_yscale("log")
    drawn = [np.empty(0)]
    styles = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"))
    for i, (name, report) in enumerate(reports.items()):
        norms = _norms(report)
        norms = norms / norms[-1] if len(norms) else norms
        shown = np.isfinite(norms) & (norms > 0)
        color, line = styles[i % len(styles)]
        depth = np.linspace(0, 1, len(norms))
        ax.plot(depth, np.where(shown, norms, np.nan), color=color, linestyle=line, linewidth=1.3, label=name)
        drawn.append(norms[shown])
    _log_limits(ax, np.concatenate(drawn))
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if reports:
        ax.legend(fontsize=font, borderpad=0.3)
    return finish(ax, font, "depth (0 input, 1 output)", "‖gradient‖ / ‖at output‖", "Gradient over depth")


def _norms(report: Report) -> NDArray[np.float64]:
    """Gradient norms at every state; that of the last follows from the growth of the last step."""
    norms = np.array([step.gradient_norm for step in report.steps], dtype=float)
    if not len(norms):
        return norms
    with np.errstate(all="ignore"):
        return np.append(norms, norms[-1] * np.exp(-report.steps[-1].growth))


def _log_limits(ax: Axes, values: NDArray[np.float64]) -> None:
    """At least one decade, so that a flat profile looks flat; plain numbers on the axis while there are few decades."""
    if not len(values):
        ax.set_ylim(0.1, 10)
        return
    low, high = float(np.log10(values.min())), float(np.log10(values.max()))
    margin = max(0.0, 1.0 - (high - low)) / 2 + 0.06 * (high - low)
    # matplotlib cannot place ticks at the very ends of the range of a float
    ax.set_ylim(10.0 ** max(low - margin, -300), 10.0 ** min(high + margin, 300))
    if high - low < 3:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2 else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        # LogLocator looks beyond the ends of the axis, and beyond the largest float
        every = math.ceil((high - low) / 5)
        ax.yaxis.set_major_locator(
            FixedLocator([10.0**k for k in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1, every)])
        )
    ax.yaxis.set_minor_formatter(NullFormatter())
