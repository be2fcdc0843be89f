"""What a process watches that tells nothing itself: its own batches, so that an odd one of them can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stabkit.diagnosis import Finding
from stabkit.monitor.batches import Batches, Odd
from stabkit.monitor.losses import FAR, LossJumps, LossReader
from stabkit.monitor.rules import AlertRules

_FIRST = 8  # steps whose batches say what is usual, beside those that are recorded


class Bystander:
    """Stands where `Foresight` does in the first process; without batches it does nothing, as after an error.

    Of processes that train together the first tells; the loss of another one's batch is not among those it reads. A
    bystander reads the losses of its own, and keeps the batch that was odd when one stood out.

    Args:
        batches: what goes into the model here.
        rules: of the monitor.

    Attributes:
        loss: the newest that was read.
        calm: whether all is known to be well; a bystander never says so.
        suspicious: whether every step is to be recorded; likewise.
    """

    calm = suspicious = False

    def __init__(self, batches: Batches | None = None, rules: AlertRules | None = None) -> None:
        rules = rules or AlertRules()
        self._batches = batches
        self._reader, self._jumps = LossReader(), LossJumps(rules)
        self._odd: Odd | None = None
        self.loss = math.nan

    def attach(self, step: int) -> None:
        """Begin to watch what goes into the model, at a step."""
        if self._batches is not None:
            self._batches.on(step)

    def detach(self) -> None:
        """Stop watching; no hook stays behind."""
        if self._batches is not None:
            self._batches.off()

    def look(
        self, step: int, loss: Tensor | float | None, scale: Tensor | float, recorded: bool, scaled: Tensor | None
    ) -> list[Finding]:
        """Look at the batch where its loss stands out; see `Foresight.look`."""
        if self._batches is not None:
            for at, value in self._reader.take(step, loss):
                self.loss, finite = value, math.isfinite(value)
                jump = self._jumps.add(at, value) if finite else None
                if not finite or (jump is not None and jump.excess > FAR):
                    self._odd = self._batches.odd(at) or self._odd
        return []

    def done(self, step: int, loss: Tensor | float | None, *, seen: bool) -> None:
        """Let go of what only this step could ask for; see `Foresight.done`."""
        if self._batches is None:
            return
        if math.isfinite(self.loss) and (seen or step < _FIRST):
            self._batches.see()
        self._batches.passed(step + 1, late=isinstance(loss, Tensor) and loss.device.type != "cpu")

    def odd(self, step: int) -> Odd | None:
        """The odd batch of this process that is to blame at a step; one that was told of is forgotten."""
        found = None if self._batches is None else self._batches.odd(step)
        found, self._odd = found or self._odd, None
        return found

    def explained(self, findings: list[Finding], odds: Sequence[Odd | None], began: int, step: int) -> list[Finding]:
        """The findings as they are."""
        return findings

    def before_clipping(self, scale: Tensor | float) -> None:
        """Nothing is kept."""

    def take(self) -> None:
        """Nothing is measured."""

    def first_sign(self, step: int) -> int:
        """The step itself."""
        return step

    def known(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def blamed(self, step: int) -> None:
        """No batch: a capsule is written by the first process."""
