"""Garbage collection while many objects are made that all stay."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

from stabkit.turns import turn, undone


@contextlib.contextmanager
def young_only() -> Iterator[None]:
    """Look for garbage among new objects only, until the block ends.

    A full collection visits every object of the process, some hundred thousand once torch is loaded. Python starts one
    whenever enough objects have stayed, and to record a deep network is to make objects that stay: the pass of a
    thousand layers would take a third longer for looking at what is no garbage. Cycles that a model makes and drops in
    its forward pass are young, and are still freed.

    Example:
        >>> before = gc.get_threshold()
        >>> with young_only():
        ...     print(gc.get_threshold()[:2] == before[:2])
        True
        >>> gc.get_threshold() == before
        True
    """
    with turn():  # thresholds are those of the process
        before = gc.get_threshold()
        with undone(lambda: gc.set_threshold(*before)):
            gc.set_threshold(before[0], before[1], sys.maxsize >> 33)
            yield
