"""The errors that stabkit raises on bad input: what was found, what is accepted, and the nearest fix."""

from __future__ import annotations


class StabkitError(Exception):
    """Something that the caller can mend; the command line prints its message and exits with code 2."""


class TraceError(StabkitError):
    """The forward pass could not be turned into a chain of differentiable steps."""


class CheckpointError(StabkitError):
    """A file, a directory or a model name could not be turned into a model and its input."""


class ReportError(StabkitError):
    """A report could not be read, written or drawn."""
