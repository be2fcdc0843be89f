"""Pictures over depth: gradient growth and gradient norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import accepts
from stabkit.plotting.depth import FloatArray, Norms, depth_axis, over_depth
from stabkit.plotting.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    empty,
    finish,
    ink,
    log_limits,
    new_axes,
    paper,
    small_text,
    verbatim,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.growth import GradientProfile
    from stabkit.report import Report

_FLAT = 0.01  # nats that the axis of growth spans at least, so that rounding does not look like growth


@accepts
def growth(result: Report | GradientProfile, ax: Axes | None = None) -> Axes:
    """Gradient growth of every step as bars, and its sum from the output as a line; both in nats.

    The line has an axis of its own on the right, with the same zero: a single step is small beside the sum of
    many. Transitions are hatched; whiskers are the intervals over samples; a step whose growth is not finite
    has a cross on the zero line and ends the sum.

    Args:
        result: a report, or what ``stabkit.gradient_profile`` returned.
        ax: where to draw; a new figure when None.

    Example:
        >>> import torch, stabkit
        >>> flow = stabkit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), torch.ones(3, 2))
        >>> growth(stabkit.gradient_profile(flow)).get_ylabel()
        'per step (nats)'
    """
    ax, font = new_axes(ax, 8, 6)
    depth = over_depth(result)
    values, where = depth.growth, np.arange(len(depth.growth))
    finite = np.isfinite(values)
    heights = np.where(finite, values, 0.0)
    bars = ax.bar(
        where, heights, width=0.75, color=[ORANGE if value > 0 else BLUE for value in heights], linewidth=0, zorder=2
    )
    for bar, kind in zip(bars, depth.kinds, strict=True):
        if kind == "transition":
            bar.set(hatch="/////", edgecolor=paper(ax), linewidth=0)
    _whiskers(ax, depth.ends, where, finite)
    if (~finite).any():
        ax.plot(where[~finite], np.zeros((~finite).sum()), "x", color=ink(ax), markersize=5, zorder=4, clip_on=False)
    ax.axhline(0, color=ink(ax), linewidth=0.6, zorder=3)

    edges = np.arange(len(values) + 1) - 0.5
    total = np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
    right = ax.twinx()
    right.plot(edges, np.where(np.isfinite(total), total, np.nan), color=ink(ax), linewidth=1.1, zorder=5)
    right.plot(edges[-1:], total[-1:], ".", color=ink(ax), markersize=4, zorder=5)
    _share_zero(ax, right)
    right.set_ylabel("sum from output (nats)", fontsize=font)
    small_text(right, font)
    depth_axis(ax, depth.names, font)
    title = "Gradient growth"
    if (~finite).any():
        title += f" (×: {int((~finite).sum())} not finite)"
    return finish(ax, font, None, "per step (nats)", title)


def _whiskers(ax: Axes, ends: FloatArray, where: NDArray[np.int64], finite: NDArray[np.bool_]) -> None:
    shown = finite & np.isfinite(ends).all(axis=1)
    width = 0.7 if len(where) < 40 else 0.4
    ax.vlines(where[shown], ends[shown, 0], ends[shown, 1], color=ink(ax), linewidth=width, zorder=4)


def _share_zero(left: Axes, right: Axes) -> None:
    """Set the limits of two y axes so that zero is at one height and neither wastes more than it must."""
    spans = []
    for ax in (left, right):
        low, high = ax.dataLim.intervaly
        low, high = (min(low, 0.0), max(high, 0.0)) if math.isfinite(low + high) else (0.0, 0.0)
        spans.append((low, high, max(high - low, _FLAT)))
    below = max(-low / size for low, _, size in spans)
    above = max(high / size for _, high, size in spans)
    if below + above < 1:  # both spans are at their least: zero in the middle of what is left
        below, above = below + (1 - below - above) / 2, above + (1 - below - above) / 2
    for ax, (_, _, size) in zip((left, right), spans, strict=True):
        ax.set_ylim(-(below + 0.06) * size, (above + 0.06) * size)


@accepts
def gradients(result: Report | GradientProfile, ax: Axes | None = None) -> Axes:
    """The norm of the gradient over depth, on a logarithmic scale, with its interval over samples.

    Step i is drawn where its source state is, so the line starts at the first state and ends at the last. A norm
    of zero has a triangle on the lower frame, one that is not finite a cross on the upper.

    Args:
        result: a report, or what ``stabkit.gradient_profile`` returned.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    ax.set_yscale("log")
    depth = over_depth(result)
    norms = depth.gradient.values
    drawn = _norm_line(ax, depth.gradient, BLUE, "-", "gradient")
    signs = []
    where = np.arange(len(norms)) - 0.5
    zero, wild = norms == 0, ~np.isfinite(norms)
    for sign, marker, missing, height in (("▼ zero", "v", zero, 0.03), ("× not finite", "x", wild, 0.97)):
        if missing.any():
            signs.append(sign)
            heights = np.full(missing.sum(), height)
            ax.plot(where[missing], heights, marker, color=ORANGE, markersize=4, transform=ax.get_xaxis_transform())
    log_limits(ax, drawn)
    depth_axis(ax, depth.names, font)
    title = f"Gradient norm ({', '.join(signs)})" if signs else "Gradient norm over depth"
    return finish(ax, font, None, "‖gradient‖", title)


@accepts
def norms(result: Report | GradientProfile, ax: Axes | None = None) -> Axes:
    """Norms of the states and of the gradient over depth, on one logarithmic scale, with intervals over samples.

    Dotted lines stand where a random cotangent was drawn anew: the gradients left and right of them do not compare.
    Where gradients are beyond the range of a float, the axis counts powers of ten.

    Args:
        result: a report, or what ``stabkit.gradient_profile`` returned.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    depth = over_depth(result)
    series = ((depth.gradient, BLUE, "-", "gradient"), (depth.state, ORANGE, "--", "state"))
    quantity = "norm"
    if depth.gradient.powers is None:
        ax.set_yscale("log")
        log_limits(ax, np.concatenate([_norm_line(ax, *one) for one in series]))
    else:
        quantity = "log10 of the norm"
        for one, color, line, label in series:
            with np.errstate(divide="ignore"):
                powers = np.log10(one.values) if one.powers is None else one.powers
            shown = np.where(np.isfinite(powers), powers, np.nan)
            ax.plot(np.arange(len(shown)) - 0.5, shown, line, color=color, linewidth=1.1, label=label)
    for index in getattr(result, "restarts", ()):
        ax.axvline(index - 0.5, color=ink(ax), linestyle=":", linewidth=0.7)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(handles, labels, fontsize=font, borderpad=0.3, framealpha=0.8)
    else:
        empty(ax, "no norm is finite\nand above zero", font)
    depth_axis(ax, depth.names, font)
    return finish(ax, font, None, quantity, "States and gradients over depth")


def _norm_line(ax: Axes, norms: Norms, color: str, line: str, label: str) -> FloatArray:
    """Draw one norm as a line through dots with its interval as a band; the values that the axis must hold."""
    values, ends = norms.values, norms.ends
    where = np.arange(len(values)) - 0.5
    shown = np.isfinite(values) & (values > 0)
    if not shown.any():
        return np.empty(0)
    size = 2.0 if len(values) < 40 else 1.0
    ax.plot(where, np.where(shown, values, np.nan), color=color, linestyle=line, linewidth=1.1, label=label)
    ax.plot(where[shown], values[shown], "o", color=color, markersize=size)
    known = shown & np.isfinite(ends).all(axis=1) & (ends > 0).all(axis=1)
    low, high = (np.where(known, side, np.nan) for side in ends.T)
    ax.fill_between(where, low, high, color=color, alpha=0.2, linewidth=0, zorder=1)
    return np.concatenate([values[shown], ends[known].ravel()])


@accepts
def compare(reports: Mapping[str, Report | GradientProfile], ax: Axes | None = None) -> Axes:
    """The gradient norms of several reports over depth, each divided by its norm at the output.

    Args:
        reports: reports or gradient profiles by the names they get in the legend.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    ax.set_yscale("log")
    drawn = [np.empty(0)]
    styles = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"))
    for i, (name, report) in enumerate(reports.items()):
        norms = over_depth(report).gradient.values
        norms = norms / norms[-1] if len(norms) else norms
        shown = np.isfinite(norms) & (norms > 0)
        color, line = styles[i % len(styles)]
        depth = np.linspace(0, 1, len(norms))
        ax.plot(depth, np.where(shown, norms, np.nan), color=color, linestyle=line, linewidth=1.3, label=verbatim(name))
        drawn.append(norms[shown])
    log_limits(ax, np.concatenate(drawn))
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if reports:
        ax.legend(fontsize=font, borderpad=0.3)
    return finish(ax, font, "depth (0 input, 1 output)", "‖gradient‖ / ‖at output‖", "Gradient over depth")
