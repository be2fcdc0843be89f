"""Stability analysis for PyTorch: a deep network read as a numerical integrator.

Public names are imported on first use, so that ``stabkit --help`` does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stabkit._version import __version__

if TYPE_CHECKING:
    from stabkit.analysis import analyze as analyze
    from stabkit.checkpoints import load as load
    from stabkit.errors import StabkitError as StabkitError
    from stabkit.growth import gradient_profile as gradient_profile
    from stabkit.identification import identify as identify
    from stabkit.jacobians import Jacobian as Jacobian
    from stabkit.jacobians import eigenvalues as eigenvalues
    from stabkit.jacobians import non_normality as non_normality
    from stabkit.jacobians import singular_values as singular_values
    from stabkit.report.schema import Report as Report
    from stabkit.tracing import Flow as Flow
    from stabkit.tracing import trace as trace

# public name -> module that defines it
_PUBLIC = {
    "Report": "stabkit.report.schema",
    "StabkitError": "stabkit.errors",
    "analyze": "stabkit.analysis",
    "Flow": "stabkit.tracing",
    "Jacobian": "stabkit.jacobians",
    "eigenvalues": "stabkit.jacobians",
    "gradient_profile": "stabkit.growth",
    "identify": "stabkit.identification",
    "load": "stabkit.checkpoints",
    "non_normality": "stabkit.jacobians",
    "singular_values": "stabkit.jacobians",
    "trace": "stabkit.tracing",
}
_SUBMODULES = ("integrators", "plotting")

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
