"""Who is told what an analysis has found so far: the verdict first, then every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from stabkit.diagnosis import Diagnosis
from stabkit.report.schema import StepReport

Progress = Callable[[int, int, str], None]
_ENOUGH = 0.05  # part of the work from which it tells how long the rest takes


@runtime_checkable
class Listener(Protocol):
    """Is told of the verdict as soon as it is known, and of every step as its spectrum comes.

    Example:
        >>> import torch
        >>> from stabkit.analysis import analyze
        >>> class Log:
        ...     def verdict(self, diagnosis):
        ...         print(diagnosis.verdict.name)
        ...     def step(self, done, total, step, seconds_left):
        ...         print(f"{done} of {total}: {step.name}")
        >>> _ = analyze(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh()), torch.zeros(2, 4), progress=Log())
        stable
        1 of 1: 1
    """

    def verdict(self, diagnosis: Diagnosis) -> None:
        """The verdict, the findings and what they rest on; no spectrum has been computed yet."""
        ...

    def step(self, done: int, total: int, step: StepReport, seconds_left: float) -> None:
        """A step is finished.

        Args:
            done: how many are.
            total: how many there are.
            step: its record, with all its numbers.
            seconds_left: until the last one is, about; NaN before anything is known of it.
        """
        ...


class Told:
    """Passes events on to a listener, or to a function of (done, total, step name); estimates the time left."""

    def __init__(self, progress: Progress | Listener | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._began = time.perf_counter()

    def verdict(self, diagnosis: Diagnosis) -> None:
        """The verdict is known."""
        if isinstance(self._progress, Listener):
            self._progress.verdict(diagnosis)

    def begin(self) -> None:
        """Spectra begin."""
        self._began = time.perf_counter()

    def step(self, step: StepReport, spent: float) -> None:
        """A step is finished, with a part ``spent`` (0 to 1) of all that the spectra cost."""
        self._done += 1
        if isinstance(self._progress, Listener):
            passed = time.perf_counter() - self._began
            left = passed / spent * (1 - spent) if spent > _ENOUGH else float("nan")
            self._progress.step(self._done, self._total, step, left)
        elif self._progress is not None:
            self._progress(self._done, self._total, step.name)
