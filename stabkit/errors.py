"""The errors that stabkit raises on bad input: what was found, what is accepted, and the nearest fix.

Every refusal is a `StabkitError`; one about an argument is besides the built-in error that Python would raise there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from stabkit.text import printable


class StabkitError(Exception):
    """Something that the caller can mend; the command line prints its message and exits with code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ArgumentError(StabkitError, ValueError):
    """An argument has a value that is not accepted."""


class ArgumentTypeError(StabkitError, TypeError):
    """An argument is of a type that is not accepted."""


class OutOfRangeError(StabkitError, IndexError):
    """An index (of a step, a sample, a coordinate) lies outside of what there is."""


class TraceError(StabkitError):
    """The forward pass could not be turned into a chain of differentiable steps."""


class CheckpointError(StabkitError):
    """A file, a directory or a model name could not be turned into a model and its input."""


class ReportError(StabkitError):
    """A report could not be read, written or drawn."""


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest that are accepted, or nothing where none is near.

    Example:
        >>> did_you_mean("economi", ["economy", "standard"]), did_you_mean("other", ["economy", "standard"])
        ('; did you mean economy?', '')
    """
    found = difflib.get_close_matches(name, list(accepted))
    return f"; did you mean {' or '.join(found)}?" if found else ""
