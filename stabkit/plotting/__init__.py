"""Pictures of results. Every plot takes a result and ``ax=None`` and returns the Axes.

Without ``ax`` a new ``matplotlib.figure.Figure`` is made: neither pyplot nor a display is touched, and
``axes.figure.savefig`` writes it. Categories have the colors of Okabe and Ito, "Color Universal Design" (2008),
depth has viridis; both can be told apart with any of the common color vision deficiencies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from stabkit.plotting.plane import method, region, spectrum
from stabkit.plotting.profile import compare, gradients, growth
from stabkit.plotting.style import CENTIMETER, FONT, figure_of, render, small_text

if TYPE_CHECKING:
    from stabkit.report import Report

__all__ = ["compare", "figure_of", "gradients", "growth", "method", "overview", "region", "render", "spectrum"]


def overview(report: Report) -> Figure:
    """The three pictures of a report side by side: region, growth, gradients."""
    figure = Figure(figsize=(26 * CENTIMETER, 7.5 * CENTIMETER), dpi=200, layout="constrained")
    axes = figure.subplots(1, 3)
    for draw, ax in zip((region, growth, gradients), axes, strict=True):
        small_text(ax, FONT)
        draw(report, ax)
    return figure
