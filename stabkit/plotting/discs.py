"""Spectra through depth: the stability disc that slides from a residual network to a plain one, and ridgelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.plotting.style import GREY, complex_plane, empty, end_of, finish, ink, new_axes, paper, sample_color

if TYPE_CHECKING:
    from stabkit.report import Report

_LARGEST_VIEW = 3.0
if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.report import Report

_RIDGES = 24  # that can be told apart; of more steps every second, third, ... is drawn
_GRID = 256
_FLOOR = 1e-6  # smaller moduli are drawn here


@accepts
def sliding_disc(
    report: Report | None = None, ax: Axes | None = None, *, damping: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> Axes:
    r"""Discs \|1 - lambda + z\| <= 1: lambda = 0 is a residual block, lambda = 1 a plain layer.

    Damping the skip moves the disc of forward Euler to the right, over eigenvalues with a positive real part (Yang,
    Liu, Bao and Shi, ICML 2020).

    A lesson with a picture: ``examples/damped_residual_network.py``.

    Args:
        report: draws its eigenvalues on top; None draws the discs alone.
        ax: where to draw; a new figure when None.
        damping: the values of lambda.

    Raises:
        ArgumentError: a damping outside 0 to 1.
    """
    if any(not 0 <= value <= 1 for value in damping):
        raise ArgumentError(f"damping={tuple(damping)}; every lambda must lie between 0 and 1")
    ax, font = new_axes(ax, 8, 6.5)
    for place, value in enumerate(damping):
        color = sample_color(ax, place, max(len(damping), 2))
        center = -(1 - value)
        ax.add_patch(Circle((center, 0), 1, facecolor=color, alpha=0.08, edgecolor="none"))
        label = f"{value:g}" if place else f"λ = {value:g}"
        ax.add_patch(Circle((center, 0), 1, fill=False, edgecolor=color, linewidth=1.2, label=label))
        ax.plot([center], [0], "+", color=color, markersize=5)
    left, right, height, beyond = -2.25, 1.25, 1.15, 0
    if report is not None:
        values = [np.asarray(step.z) for step in report.steps if step.z]
        z = np.concatenate([np.empty(0, complex), *values])
        z = z[np.isfinite(z)]
        ax.scatter(z.real, z.imag, s=3, color=ink(ax), linewidths=0, alpha=0.6, rasterized=len(z) > 2000, zorder=3)
        if len(z):
            # beyond, the discs would be too small to see what slides over what
            reach = min(float(np.quantile(np.abs(z + 0.5), 0.98)), _LARGEST_VIEW)
            near = z[np.abs(z + 0.5) <= reach]
            left, right = min(left, 1.05 * near.real.min(initial=0)), max(right, 1.05 * near.real.max(initial=0))
            height = max(height, 1.05 * float(np.abs(near.imag).max(initial=0)))
            beyond = int(((z.real < left) | (z.real > right) | (np.abs(z.imag) > height)).sum())
    spare = max(0.0, 3.2 * height - (right - left)) / 2  # as wide as the legend
    left, right = left - spare, right + spare
    complex_plane(ax)
    ax.set_xlim(left, right)
    ax.set_ylim(-height, 1.5 * height)  # room for the legend
    ax.set_aspect("equal")
    ax.legend(loc="upper center", ncols=len(damping), fontsize=font, handlelength=0.6, columnspacing=0.6, frameon=False)
    title = "From residual, λ = 0, to plain, λ = 1" + (f"\n{beyond} eigenvalues beyond the frame" if beyond else "")
    return finish(ax, font, "Re z", "Im z", title)


@accepts
def ridgelines(report: Report, ax: Axes | None = None) -> Axes:
    r"""Densities of log10 \|eigenvalue of J\|, one ridge a step, the input at the top.

    What lies right of the line at \|eigenvalue\| = 1 grows. Every ridge has the same height, so that a narrow one does
    not flatten the others. Only steps whose whole spectrum was computed are drawn: the
    largest few eigenvalues are no density.

    Args:
        report: a report.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 7)
    steps = [step for step in report.steps if step.z and step.spectrum_method == "dense"]
    every = -(-len(steps) // _RIDGES) if steps else 1
    shown = steps[::every]
    logs = [np.log10(np.maximum(np.abs(np.asarray(s.z) + (s.skip or 0.0)), _FLOOR)) for s in shown]
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=100)
    if not shown:
        empty(ax, "no whole spectrum\nin this report", font)
        ax.set_xticks([])
        return finish(ax, font, "log10 |eigenvalue of J|", "step (input on top)", "Spectra over depth")
    low = min(float(np.quantile(row, 0.02)) for row in logs)
    high = max(float(row.max()) for row in logs)
    low, high = min(low, -0.1), max(high, 0.1)
    margin = 0.15 * (high - low)
    grid = np.linspace(low - margin, high + margin, _GRID)
    ridges = [_density(row, grid) for row in logs]
    for place, ridge in enumerate(ridges):
        base = -float(place)
        height = 1.6 * ridge / ridge.max()
        color = sample_color(ax, place, len(shown))
        ax.fill_between(grid, base, base + height, color=color, alpha=0.75, linewidth=0, zorder=place)
        ax.plot(grid, base + height, color=paper(ax), linewidth=0.6, zorder=place)
    spaced = range(0, len(shown), max(1, len(shown) // 8))
    ax.set_yticks([-float(place) for place in spaced], [end_of(shown[place].name, 14) for place in spaced])
    ax.set_xlim(grid[0], grid[-1])
    ax.set_ylim(-len(shown) + 0.6, 1.9)
    return finish(ax, font, "log10 |eigenvalue of J|", "step (input on top)", "Spectra over depth")


def _density(values: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """A Gaussian kernel density with Silverman's bandwidth, no narrower than two points of the grid."""
    spread = min(float(values.std()), float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / 1.34 or np.inf)
    width = max(0.9 * spread * len(values) ** -0.2, 2 * (grid[1] - grid[0]))
    kernels = np.exp(-0.5 * ((grid[:, None] - values[None, :]) / width) ** 2)
    density: NDArray[np.float64] = kernels.sum(axis=1) / (len(values) * width * np.sqrt(2 * np.pi))
    return density
