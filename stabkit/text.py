"""Text that may hold what a file or a model says of itself, as it can be shown anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def printable(text: str) -> str:
    r"""A text without control characters, which are shown as escapes; line ends stay.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    kept = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "".join(kept)


def shows_printable(told: Callable[[Any], str]) -> Callable[[Any], str]:
    """A ``__str__`` or ``__repr__`` whose text is printable."""

    @functools.wraps(told)
    def shown(item: Any) -> str:
        return printable(told(item))

    return shown
