"""Weights that were written to after a trace: the derivatives that were recorded are those of other ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stabkit.errors import TraceError

_BY_TORCH = "modified by an inplace operation"


def weights_changed() -> TraceError:
    """What is said of a flow whose model was trained since."""
    return TraceError(
        "the model's weights were changed after it was traced, so its derivatives are gone: call stabkit.trace again. "
        "(If nothing changed them, the forward pass overwrites its own parameters, by clamping or renormalising them: "
        "apply that change beforehand)"
    )


def is_of_changed_weights(error: Exception) -> bool:
    """Whether torch refuses a backward pass since something that it needs was written to."""
    return _BY_TORCH in str(error)


@contextlib.contextmanager
def refusing_changed_weights() -> Iterator[None]:
    """Take derivatives inside, of what was recorded before.

    Raises:
        TraceError: something that they need was written to since.
    """
    try:
        yield
    except RuntimeError as error:
        if is_of_changed_weights(error):
            raise weights_changed() from error
        raise
