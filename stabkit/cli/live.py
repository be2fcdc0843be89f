"""What `stabkit analyze` says while it works: what was loaded, then the verdict, then the steps as they come."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stabkit.cli.console import say, screen
from stabkit.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.checkpoints import Loaded
    from stabkit.diagnosis import Diagnosis
    from stabkit.report.schema import StepReport

_PAUSE = 1.0  # seconds between two lines about steps in a pipe


class Live:
    """A listener of an analysis that prints the answer at once, and the progress on standard error.

    On a terminal progress is a line that changes; in a pipe it is a line a second at most.

    Args:
        loaded: the model that is analysed.
        console: where the answer goes, also while standard output is turned away from it.
    """

    def __init__(self, loaded: Loaded, console: Console) -> None:
        self._loaded = loaded
        self._console = console
        if not console.stderr:
            console.file = sys.stdout
        self._errors = screen(stderr=True)
        self._status: Any = None
        self._told = -_PAUSE

    def __enter__(self) -> Live:
        mode = "train" if self._loaded.model.training else "eval"
        self._show(f"{self._loaded.description}; {mode} mode", "dim")
        self._wait("measuring the gradient")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(None)

    def verdict(self, diagnosis: Diagnosis) -> None:
        """Print the verdict and the findings."""
        from stabkit.report import terminal

        self._wait(None)
        verdict = diagnosis.verdict
        self._console.print()
        shown = terminal.answer(self._loaded.name, verdict.name, verdict.summary, diagnosis.findings)
        self._console.print(shown, highlight=False)
        self._console.file.flush()
        self._wait("explaining the steps")

    def step(self, done: int, total: int, step: StepReport, seconds_left: float) -> None:
        """Say which step is finished, what its spectrum is, and how long the others will take."""
        from stabkit.report import formats

        radius = "" if step.spectral_radius is None else f", radius {formats.figures(step.spectral_radius)}"
        left = f", about {seconds_left:.0f} s left" if done < total and seconds_left >= 1 else ""
        name = formats.middle(printable(step.name), 40)
        self._wait(f"{done} of {total} steps: {name}, growth {formats.signed(step.growth)}{radius}{left}")

    def _wait(self, message: str | None) -> None:
        """Show what is being done; None when nothing is."""
        if not self._errors.is_terminal:
            now = time.monotonic()
            if message is not None and now - self._told >= _PAUSE:
                say(self._errors, message)
                self._told = now
        elif message is None:
            if self._status is not None:
                self._status.stop()
            self._status = None
        elif self._status is None:
            self._status = self._errors.status(message)
            self._status.start()
        else:
            self._status.update(message)

    def _show(self, text: str, style: str) -> None:
        from stabkit.report.terminal import plain_text

        self._console.print(plain_text(text, style), highlight=False)
        self._console.file.flush()
