"""Hooks that are on for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Hooks that are taken off at its end, whatever happens within.

    Args:
        handles: what registering them returned.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
