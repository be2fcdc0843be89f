"""How the spectrum moves through depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from stabkit.plotting.style import GREY, empty, end_of, finish, new_axes, paper, sample_color

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.report import Report

_RIDGES = 24  # that can be told apart; of more steps every second, third, ... is drawn
_GRID = 256
_FLOOR = 1e-6  # smaller moduli are drawn here


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
