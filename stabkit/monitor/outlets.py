"""Where what a monitor has to say goes: writers, the log of the program, and whoever asked to be called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from stabkit.diagnosis import Finding
from stabkit.monitor.arguments import Callback
from stabkit.monitor.record import Record
from stabkit.monitor.sentences import line
from stabkit.monitor.writers import Writer

#: A program that has not set up logging has warnings and worse on stderr; what is an info is silent there.
LOGGER = logging.getLogger("stabkit.monitor")
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}

_AGAIN = 50  # training steps without a finding, after which one is news
_ALWAYS = "non_finite"  # that numbers are lost is news once in the midst of other findings

Part = Callable[[str, Callable[[], object]], bool]


class Outlets:
    """Hands on records and findings; one that fails is left out from then on, and the others go on.

    Args:
        writers: get every record, and every finding where they have a method ``alert(finding, step)``.
        callbacks: get every finding.
        part: runs one of them under a name, and says whether it worked.
        logs: whether this process writes to the log; of several that train together one does.
    """

    def __init__(
        self, writers: Sequence[Writer], callbacks: Sequence[Callback], part: Part, *, logs: bool = True
    ) -> None:
        self._writers, self._callbacks, self._part, self._logs = list(writers), list(callbacks), part, logs
        self._last, self._lost = -_AGAIN, False

    def publish(self, record: Record) -> None:
        """Give a record to every writer."""
        self._to_writers(lambda writer: partial(writer.write, record))

    def say(self, findings: Sequence[Finding], step: int) -> None:
        """Tell findings: a line each in the log, a mark in each writer that has room for one, a call of each callback.

        Args:
            findings: what was found, each told for the first time.
            step: the training step.
        """
        for finding in findings:
            self._log(finding, step)
            self._to_writers(partial(_alert, finding=finding, step=step))
            for callback in tuple(self._callbacks):
                if not self._part("a callback on alerts", partial(callback, finding)):
                    self._callbacks.remove(callback)

    def close(self, summary: str, *, quiet: bool) -> None:
        """Say how it went, and close the writers.

        Args:
            summary: one line.
            quiet: whether there was nothing to say while it went.
        """
        if summary and self._logs:
            LOGGER.log(logging.INFO if quiet else logging.WARNING, "%s", summary)
        for writer in self._writers:
            self._part(_name(writer), writer.close)
        self._writers = []

    def _log(self, finding: Finding, step: int) -> None:
        """A line in the log; what comes soon after another finding follows from it mostly, and is an info."""
        if step - self._last >= _AGAIN:
            self._lost = False
        level = _LEVELS[finding.severity]
        news = step - self._last >= _AGAIN or (finding.kind == _ALWAYS and not self._lost)
        if level > logging.INFO:
            placed = finding.kind == _ALWAYS and finding.module_path != ""  # where it is may be told a step later
            self._last, self._lost = step, self._lost or placed
        if self._logs:
            LOGGER.log(level if news else logging.INFO, "%s", line(finding, step))

    def _to_writers(self, action: Callable[[Writer], Callable[[], object] | None]) -> None:
        for writer in tuple(self._writers):
            call = action(writer)
            if call is not None and not self._part(_name(writer), call):
                self._writers.remove(writer)


def _alert(writer: Writer, *, finding: Finding, step: int) -> Callable[[], object] | None:
    alert = getattr(writer, "alert", None)
    return None if alert is None else partial(alert, finding, step)


def _name(writer: Writer) -> str:
    return f"the writer {type(writer).__name__}"
