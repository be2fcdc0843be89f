"""The stability disc that slides from a residual network to a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from stabkit.errors import ArgumentError
from stabkit.plotting.style import complex_plane, finish, ink, new_axes, sample_color

if TYPE_CHECKING:
    from stabkit.report import Report

_LARGEST_VIEW = 3.0


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
