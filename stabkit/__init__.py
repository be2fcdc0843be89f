"""Stability analysis for PyTorch: a deep network read as a numerical integrator.

Public names are imported on first use, so that ``stabkit --help`` does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stabkit._version import __version__

if TYPE_CHECKING:
    from stabkit.errors import StabkitError as StabkitError

# public name -> module that defines it
_PUBLIC = {
    "StabkitError": "stabkit.errors",
}
_SUBMODULES = ("integrators",)

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]  # noqa: PLE0604


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
