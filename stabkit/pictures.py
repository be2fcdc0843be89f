"""Which picture is drawn of which result: the one table behind `stabkit plot KIND`, its help, and ``result.plot()``.

A new plot is a function in `stabkit.plotting` and a line here. Functions and results are named, not imported: pictures
stand above the results that they show, and help needs neither.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

#: Kind of picture -> class of what is drawn -> function in `stabkit.plotting`. Of several pictures of one class, the
#: first is the one that ``result.plot()`` draws. ``Grid`` and ``Lattice`` are flows of the points that
#: `stabkit.plotting.grid_points` gives, along fine lines or on a coarse lattice.
PICTURES: dict[str, dict[str, str]] = {
    "region": {"Report": "region"},
    "discs": {"Report": "sliding_disc"},
    "spectra": {"Report": "ridgelines"},
    "norms": {"Report": "norms", "GradientProfile": "norms"},
    "growth": {"Report": "growth", "GradientProfile": "growth", "Records": "training"},
    "attribution": {"Report": "attribution", "Attribution": "attribution"},
    "gradients": {"Report": "gradients", "GradientProfile": "gradients"},
    "graph": {"Report": "graph", "Flow": "graph"},
    "overview": {"Report": "overview"},
    "update": {"Report": "update"},
    "updates": {"Report": "updates"},
    "training": {"Records": "training"},
    "spectrum": {"StepReport": "spectrum", "Spectrum": "spectrum"},
    "pseudospectra": {"Jacobian": "pseudospectra"},
    "range": {"NonNormality": "numerical_range"},
    "density": {"SingularValueDensity": "singular_value_density"},
    "lyapunov": {"Report": "lyapunov", "LyapunovSpectrum": "lyapunov"},
    "convergence": {"Report": "lyapunov_convergence", "LyapunovSpectrum": "lyapunov_convergence"},
    "sums": {"Report": "sum_rule", "LyapunovSpectrum": "sum_rule"},
    "finite-time": {"FiniteTimeExponents": "finite_time"},
    "alignment": {"AlignmentIndex": "alignment_index"},
    "angles": {"CovariantVectors": "covariant_angles"},
    "portrait": {"Flow": "phase_portrait"},
    "flow-map": {"Grid": "flow_map"},
    "field": {"Lattice": "vector_field"},
    "exponents": {"ExponentField": "exponent_field"},
    "method": {"LinearStability": "method"},
    "compare": {"Comparison": "total_growth"},
    "steps": {"Comparison": "step_growth"},
    "margin": {"Comparison": "margin"},
}


def default_picture(drawn: type) -> str | None:
    """The function in `stabkit.plotting` that draws an instance of a class, or None.

    Example:
        >>> class Report: pass
        >>> default_picture(Report), default_picture(int)
        ('region', None)
    """
    names = [base.__name__ for base in drawn.__mro__]
    return next((draws[name] for name in names for draws in PICTURES.values() if name in draws), None)


def drawing(name: str) -> Callable[..., Any]:
    """A function of `stabkit.plotting` by its name, as in the table; matplotlib is loaded with the first of them.

    Example:
        >>> drawing("region").__module__
        'stabkit.plotting.region'
    """
    found: Callable[..., Any] = operator.attrgetter(name)(importlib.import_module("stabkit.plotting"))
    return found
