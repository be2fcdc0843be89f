"""The learning rates in force at every training step, and where they rose."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAP = 2.0  # of the rate from one step to the next
_CLIMB = 1.5  # of the rate over the steps below
_BACK = 50  # steps: what began longer ago was borne by the loss for long
_KEPT = 64  # changes


@dataclass(frozen=True)
class Rise:
    """A learning rate that rose.

    Attributes:
        step: the first training step whose update has the new rate; of a climb the step where it began.
        low: the rate before.
        high: the rate after.
        beyond: the rate after over the largest that was in force before.
        group: which parameters, in words; empty for all.
        sudden: whether it rose in one step.
    """

    step: int
    low: float
    high: float
    beyond: float
    group: str
    sudden: bool

    def __str__(self) -> str:
        how = f"jumped at training step {self.step}" if self.sudden else f"has risen since training step {self.step}"
        return f"the learning rate{self.group} {how} from {self.low:.4g} to {self.high:.4g}"


class LearningRates:
    """Follows the rate of every group of some optimizers, whatever sets it.

    Rates that are tensors on a device are not followed: to read one would wait for it.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._groups = [
            # by its place: `load_state_dict` puts new groups there
            (one, i, f" of group {i}" if len(one.param_groups) > 1 else "", type(one).__name__)
            for one in optimizers
            for i in range(len(one.param_groups))
        ]
        self._several = len(optimizers) > 1
        self._now = [math.nan] * len(self._groups)
        self._largest = [0.0] * len(self._groups)
        self._changes: list[deque[tuple[int, float, float, float]]] = [deque(maxlen=_KEPT) for _ in self._groups]
        self.risen = -1  # the last step at which one rose beyond all before by half

    def see(self, step: int) -> None:
        """Take note of the rates of the update that comes; call it before the optimizer's step."""
        for i, (one, place, _, _) in enumerate(self._groups):
            rate = one.param_groups[place]["lr"] if place < len(one.param_groups) else self._now[i]
            if isinstance(rate, Tensor):
                if rate.device.type != "cpu":
                    continue
                rate = float(rate)
            if rate == self._now[i]:
                continue
            if self._now[i] == self._now[i]:
                self._changes[i].append((step, self._now[i], rate, self._largest[i]))
                if rate > _CLIMB * self._largest[i] > 0:
                    self.risen = step
            self._now[i], self._largest[i] = rate, max(self._largest[i], rate)

    @property
    def largest(self) -> float:
        """The largest rate in force; NaN where none is known."""
        return max((rate for rate in self._now if not math.isnan(rate)), default=math.nan)

    def rise(self, step: int, back: int = _BACK) -> Rise | None:
        """The rise in the updates before a step that went furthest beyond what was in force before; None without one.

        Args:
            step: a step whose loss or gradient comes after the updates in question.
            back: how many steps before are looked at.
        """
        found = [rise for i in range(len(self._groups)) for rise in self._rises(i, step, back)]
        return max(found, key=lambda rise: (rise.sudden, rise.beyond), default=None)

    def _rises(self, index: int, step: int, back: int) -> list[Rise]:
        changes = [change for change in self._changes[index] if step - back <= change[0] < step]
        if not changes:
            return []
        _, _, name, optimizer = self._groups[index]
        name += f" of {optimizer}" if self._several else ""
        # what rose and was taken back since is past
        last = changes[-1][2]
        # what goes on to rise is a climb, whose first step may well be from 1 to 2
        leaps = [c for c in changes if 0 < c[1] * _LEAP <= c[2] and last * _LEAP > c[2] and c[2] * _LEAP > last]
        if leaps:
            at, low, high, largest = max(leaps, key=lambda change: change[2] / change[1])
            return [Rise(at, low, high, high / largest, name, True)]
        began, low, _, largest = min(changes, key=lambda change: change[1])
        if low > 0 and last >= _CLIMB * low:
            return [Rise(began, low, last, last / largest, name, False)]
        return []
