"""How a command imports what it needs: most of the time until its first answer goes there.

torchvision asks the compiler of torch, which takes longer to import than torch itself, for one function that it calls
when a detector first runs. What stands in for the compiler meanwhile brings the true one in as soon as it is called, or
is asked for anything else.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"
_ASKED = "is_compile_supported"
_own_process: list[bool] = []  # not empty in the process of a command


def in_own_process() -> None:
    """Say that this process is that of a command: what it imports need not be looked through for garbage again.

    A program that imports a command's module keeps its collector as it is.
    """
    _own_process.append(True)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Imports make hardly any garbage, and to look for it among all that they make is a seventh of their time.

    In the process of a command, what they made stays to its end and is not looked through later either.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _own_process:
            gc.freeze()
        if collects:
            gc.enable()


def import_torchvision() -> None:
    """Import torchvision, where there is one; for a process of one's own, such as that of a command."""
    known = "torch._dynamo" in sys.modules or "torchvision" in sys.modules
    if known or find_spec("torchvision") is None:
        return
    sys.modules[_COMPILER] = _StandIn(_COMPILER)
    try:
        importlib.import_module("torchvision")
    finally:
        _give_way()


class _StandIn(ModuleType):
    """Stands in for the compiler while torchvision is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # who looks through all modules, as inspect does, asks each for its file
            raise AttributeError(name)
        return _when_called if name == _ASKED else getattr(_compiler(), name)


def _when_called(device: str) -> bool:
    supported: bool = getattr(_compiler(), _ASKED)(device)
    return supported


def _compiler() -> ModuleType:
    _give_way()
    return importlib.import_module(_COMPILER)


def _give_way() -> None:
    if isinstance(sys.modules.get(_COMPILER), _StandIn):
        del sys.modules[_COMPILER]
