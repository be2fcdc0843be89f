"""Pictures of results. Every plot takes a result and ``ax=None`` and returns the Axes.

Without ``ax`` a new ``matplotlib.figure.Figure`` is made: neither pyplot nor a display is touched, and
``axes.figure.savefig`` writes it. Categories have the colors of Okabe and Ito, "Color Universal Design" (2008),
depth has viridis; both can be told apart with any of the common color vision deficiencies. All of the plots on one
sheet: ``examples/every_plot.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from stabkit.arguments import accepts
from stabkit.plotting.attribution import attribution
from stabkit.plotting.discs import ridgelines, sliding_disc
from stabkit.plotting.exponents import (
    alignment_index,
    covariant_angles,
    exponent_field,
    finite_time,
    lyapunov,
    lyapunov_convergence,
    sum_rule,
)
from stabkit.plotting.graph import graph
from stabkit.plotting.planar import animate_flow_map, flow_map, grid_points, phase_portrait, vector_field
from stabkit.plotting.plane import method, singular_value_density, spectrum
from stabkit.plotting.profile import compare, gradients, growth, norms
from stabkit.plotting.pseudospectra import numerical_range, pseudospectra
from stabkit.plotting.records import training
from stabkit.plotting.region import region
from stabkit.plotting.style import figure_of, render, side_by_side
from stabkit.plotting.sweep import margin, step_growth, total_growth
from stabkit.plotting.update import update, updates

if TYPE_CHECKING:
    from stabkit.report import Report

__all__ = [
    "alignment_index",
    "animate_flow_map",
    "attribution",
    "compare",
    "covariant_angles",
    "exponent_field",
    "figure_of",
    "finite_time",
    "flow_map",
    "gradients",
    "graph",
    "grid_points",
    "growth",
    "lyapunov",
    "lyapunov_convergence",
    "margin",
    "method",
    "norms",
    "numerical_range",
    "overview",
    "phase_portrait",
    "pseudospectra",
    "region",
    "render",
    "ridgelines",
    "singular_value_density",
    "sliding_disc",
    "spectrum",
    "step_growth",
    "sum_rule",
    "total_growth",
    "training",
    "update",
    "updates",
    "vector_field",
]


@accepts
def overview(report: Report) -> Figure:
    """The three pictures of a report side by side: region, growth, gradients."""
    return side_by_side((region, growth, gradients), report)
