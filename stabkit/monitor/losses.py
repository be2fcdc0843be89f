"""The loss at every training step: read without waiting for a device, and judged against all that was seen before."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median  # of a few numbers a tenth of the price of numpy's
from typing import Any

import torch
from torch import Tensor

from stabkit.monitor.rules import AlertRules

# How far a loss lies above all before it, in units of the highest of those or of their range, whichever is more. A
# start of 2.3 has to be left for 2.5 (SLIGHT), 3.5 (MILD) or 9.2 (FAR). Of 26 kinds of healthy runs four went
# beyond FAR, 41 at most (outliers, rare classes, batches of 4, rewards that are rare), and only the last more than once
# in a row, four times, before FEW losses were known; most went beyond SLIGHT.
SLIGHT, MILD, FAR, ENORMOUS = 0.1, 0.5, 3.0, 1000.0
LASTS = 4  # losses in a row beyond FAR: a network that has learnt meets hard batches two at a time
FEW = 8  # losses seen before which only the rate is blamed: what is usual is not known yet
_LOST = 0.5  # of what was learnt
_SPREADS = 8.0  # robust standard deviations
_RECENT = 50


class LossReader:
    """Values of losses in their order. That of a device is copied while it works, and read when it is there."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()

    def take(self, step: int, loss: Tensor | float | None) -> list[tuple[int, float]]:
        """Every loss that can be read by now, with its step.

        Args:
            step: the present step.
            loss: its loss; None when none was given.
        """
        if isinstance(loss, Tensor) and loss.device.type == "cpu":
            loss = loss.item() if loss.numel() == 1 else float(loss.detach().sum())
        if isinstance(loss, Tensor):
            copied = loss.detach().reshape(-1).sum().to("cpu", non_blocking=True)
            event = getattr(torch, loss.device.type).Event()
            event.record()
            self._waiting.append((step, copied, event))
        found = []
        while self._waiting and self._waiting[0][0] < step and self._waiting[0][2].query():
            before, copied, _ = self._waiting.popleft()
            found.append((before, float(copied)))
        return found if loss is None or isinstance(loss, Tensor) else [*found, (step, float(loss))]


@dataclass(frozen=True)
class Jump:
    """A loss that has left what was seen before.

    Attributes:
        step: the training step.
        value: the loss.
        began: the step at which it left.
        usual: the median of the newest losses before.
        highest: the highest of all before.
        excess: how far it lies above that, in units of it or of the range before.
        lasting: the least excess of the two newest losses; 0 for one alone.
        far: how many in a row are beyond FAR.
        lost: how many in a row have lost half of what was learnt, or more.
        seen: how many losses there were before.
    """

    step: int
    value: float
    began: int
    usual: float
    highest: float
    excess: float
    lasting: float
    far: int
    lost: int
    seen: int

    @property
    def sure(self) -> bool:
        """Whether it is more than batches do, whatever the cause."""
        return self.seen >= FEW and (self.lasting > ENORMOUS or self.far >= LASTS)


class LossJumps:
    """Compares every loss with those before.

    A loss that is above all before enters the past when one follows that is not, if it was not FAR above; one that was
    may be of a broken batch, and does only where as many as ``warmup`` follow each other.

    Args:
        rules: of the monitor.
    """

    def __init__(self, rules: AlertRules) -> None:
        self._rules = rules
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._count = 0
        self._top, self._low = -math.inf, math.inf
        self._above: list[tuple[int, float, float]] = []  # step, loss and excess of those above in a row
        self._lost = self._far = 0

    def add(self, step: int, value: float) -> Jump | None:
        """How far a loss that is finite has left what was seen before; None where it has not."""
        if not self._count:
            self._remember(value)
            return None
        excess = (value - self._top) / max(self._top - self._low, abs(self._top), 1e-30)
        if value <= self._low + _LOST * (self._top - self._low):  # nothing is lost there, whatever is usual
            self._lost = self._far = 0
            self._come_back(value)
            return None
        usual = median(self._recent)
        self._lost = self._lost + 1 if self._is_lost(value, usual) else 0
        highest, seen = self._top, self._count
        lasting = 0.0
        if excess > SLIGHT:
            lasting = min(excess, self._above[-1][2]) if self._above else 0.0
            self._above.append((step, value, excess))
            if len(self._above) >= self._rules.warmup:  # a level that stays is usual
                for _, each, _ in self._above:
                    self._remember(each)
                self._above = []
        else:
            self._come_back(value)
        if excess <= SLIGHT and not self._lost:
            return None
        began = min(step - max(self._lost - 1, 0), self._above[0][0] if self._above else step)
        self._far = self._far + 1 if excess > FAR else 0
        return Jump(step, value, began, usual, highest, excess, lasting, self._far, self._lost, seen)

    def _come_back(self, value: float) -> None:
        """Take note of a loss that is no higher than others: what was above them before it has done no harm."""
        for _, each, excess in self._above:
            if excess <= FAR:
                self._remember(each)
        self._above = []
        self._remember(value)

    def _is_lost(self, value: float, usual: float) -> bool:
        if self._count < _RECENT // 2 or value <= usual + _LOST * (self._top - usual):
            return False
        spread = 1.4826 * median(abs(each - usual) for each in self._recent)
        return value > usual + _SPREADS * spread

    def _remember(self, value: float) -> None:
        self._count += 1
        self._recent.append(value)
        self._top, self._low = max(self._top, value), min(self._low, value)
