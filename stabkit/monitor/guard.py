"""Errors of the monitor's own, none of which may end a training."""

from __future__ import annotations

import warnings
from collections.abc import Callable


class Guard:
    """Runs parts of a monitor that the rest can do without, and warns of what fails.

    Attributes:
        step: the training step.
        failed: whether the monitor as a whole has stopped.
    """

    def __init__(self) -> None:
        self.step = 0
        self.failed = False

    def part(self, what: str, action: Callable[[], object], stop: Callable[[], object] = lambda: None) -> bool:
        """Run a part; whether it worked. When it fails, warn, and ``stop`` it for good."""
        try:
            action()
        except Exception as error:
            self.warn(what, error)
            stop()
            return False
        return True

    def warn(self, what: str, error: Exception) -> None:
        """Say that a part failed and is off."""
        text = f"stabkit's monitor: {what} failed at step {self.step} and is off: {type(error).__name__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)

    def warn_of_blocks(self) -> None:
        """Say that none of the blocks was seen to run."""
        text = (
            "stabkit's monitor saw none of the blocks run, only their parameters: is the model compiled as one, or not "
            "the one that is called? Compile it block by block, or give the monitor the model that is called"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=6)

    def stop(self, error: Exception) -> bool:
        """Say once that the monitor stops; whether this was the first error."""
        if self.failed:
            return False
        self.failed = True
        text = f"stabkit's monitor stopped at step {self.step}: {type(error).__name__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)
        return True
