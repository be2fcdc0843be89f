"""Whether a training suffers from what a record shows, by its loss and by the norm of all gradients."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_LARGER = math.log(4.0)  # of the norm of all gradients
_LOST = 0.1  # of what was learnt
_LEARNT = 0.05  # of the first loss, at least, where anything was


class Harm:
    """What the losses and gradient norms of records say of a training.

    What a block does to gradients changes by factors of 5 to 15 within a few steps where a network learns something new
    (the first block of a GPT as it begins to attend), and by a hundred from the start to the end of a training (rows of
    embeddings under Adagrad), while the loss falls as it should. A loss that no record has is unknown, and nothing is
    held against what moved.

    Args:
        warmup: of how many records the newest are.
    """

    def __init__(self, warmup: int) -> None:
        self._count = warmup
        self._losses: deque[float] = deque(maxlen=warmup)
        self._norms: deque[float] = deque(maxlen=warmup)
        self._first, self._lowest = math.nan, math.inf
        self._this = self._before = False

    @property
    def now(self) -> bool:
        """Whether the newest record, or the one before, stands out: what is smaller is told by two in a row."""
        return self._this or self._before

    @property
    def left(self) -> float:
        """The level of the newest losses over that of the first; NaN where they are not known."""
        if math.isnan(self._first) or not self._first > 0:
            return math.nan
        return median(self._losses) / self._first

    def see(self, loss: float, norm: float) -> None:
        """Take note of a record: its loss, and the log of the norm of all its gradients."""
        unknown = math.isnan(loss) and not self._losses
        higher = loss > max(self._losses, default=math.inf)
        larger = norm > max(self._norms, default=math.inf) + _LARGER
        self._this, self._before = unknown or higher or larger, self._this
        if math.isfinite(loss):
            self._losses.append(loss)
        if math.isfinite(norm):
            self._norms.append(norm)
        if len(self._losses) == self._count:
            level = median(self._losses)
            self._first = level if math.isnan(self._first) else self._first
            self._lowest = min(self._lowest, level)

    @property
    def lasts(self) -> bool:
        """Whether the newest losses have lost some of what was learnt, or nothing was learnt at all."""
        if math.isnan(self._first):
            return True
        learnt = self._first - self._lowest
        return learnt < _LEARNT * abs(self._first) or median(self._losses) > self._lowest + _LOST * learnt
