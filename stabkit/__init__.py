"""Stability analysis for PyTorch: a deep network read as a numerical integrator.

Public names are imported on first use, so that ``stabkit --help`` does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stabkit._version import __version__

if TYPE_CHECKING:
    from stabkit.analysis import analyze as analyze
    from stabkit.attribution import attribute as attribute
    from stabkit.checkpoints import load as load
    from stabkit.comparison import compare as compare
    from stabkit.curvature import sharpness as sharpness
    from stabkit.diagnosis import diagnose as diagnose
    from stabkit.errors import StabkitError as StabkitError
    from stabkit.growth import finite_time_exponents as finite_time_exponents
    from stabkit.growth import gradient_profile as gradient_profile
    from stabkit.growth import lyapunov_spectrum as lyapunov_spectrum
    from stabkit.identification import identify as identify
    from stabkit.jacobians import Jacobian as Jacobian
    from stabkit.jacobians import eigenvalues as eigenvalues
    from stabkit.jacobians import non_normality as non_normality
    from stabkit.jacobians import singular_values as singular_values
    from stabkit.monitor import Monitor as Monitor
    from stabkit.monitor.hugging_face import TrainerCallback as TrainerCallback
    from stabkit.monitor.lightning import MonitorCallback as MonitorCallback
    from stabkit.report.report import Report as Report
    from stabkit.tracing import Flow as Flow
    from stabkit.tracing import iterate as iterate
    from stabkit.tracing import recurrent_flow as recurrent_flow
    from stabkit.tracing import trace as trace

# public name -> module that defines it
_PUBLIC = {
    "Flow": "stabkit.tracing",
    "Jacobian": "stabkit.jacobians",
    "Monitor": "stabkit.monitor",
    "MonitorCallback": "stabkit.monitor.lightning",
    "Report": "stabkit.report.report",
    "StabkitError": "stabkit.errors",
    "TrainerCallback": "stabkit.monitor.hugging_face",
    "analyze": "stabkit.analysis",
    "compare": "stabkit.comparison",
    "attribute": "stabkit.attribution",
    "diagnose": "stabkit.diagnosis",
    "eigenvalues": "stabkit.jacobians",
    "finite_time_exponents": "stabkit.growth",
    "gradient_profile": "stabkit.growth",
    "identify": "stabkit.identification",
    "iterate": "stabkit.tracing",
    "load": "stabkit.checkpoints",
    "lyapunov_spectrum": "stabkit.growth",
    "non_normality": "stabkit.jacobians",
    "recurrent_flow": "stabkit.tracing",
    "sharpness": "stabkit.curvature",
    "singular_values": "stabkit.jacobians",
    "trace": "stabkit.tracing",
}
_SUBMODULES = (
    "curvature",
    "distributed",
    "integrators",
    "meanfield",
    "planning",
    "plotting",
    "streaming",
    "vocabulary",
)

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"stabkit.{name}")
    else:
        raise AttributeError(f"module 'stabkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_SUBMODULES})
