"""Many time series judged at once: what is usual, and what has left it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabkit.monitor.record import Array
from stabkit.monitor.rules import AlertRules


@dataclass(frozen=True)
class Move:
    """One series that has left its usual range.

    Attributes:
        series: its index.
        what: ``spike`` or ``drift``.
        value: what it is now; for a drift the median of the newest values.
        usual: the median of what came before; for a drift that of the first values.
        size: distance in robust deviations for a spike, in thresholds for a drift.
        fresh: whether it was not reported lately.
        late: whether it began with the value before.
    """

    series: int
    what: str
    value: float
    usual: float
    size: float
    fresh: bool
    late: bool = False


class SeriesBank:
    """The past of many series, as columns.

    A spike does not enter the past, so that it does not become usual; a level that stays for ``warmup`` values does.

    Args:
        rules: when a series counts as moved.
        jumps: the least distance from usual of each, in the unit of the series; ``(series,)``.
        certain: distances below these must last for two values to count; ``(series,)``.
        drifting: so many of them, from the first, are watched for drift.
    """

    def __init__(self, rules: AlertRules, jumps: Array, certain: Array, drifting: int) -> None:
        count = len(jumps)
        self.rules = rules
        self._jumps = jumps
        self._certain = certain
        self._drifting = np.arange(count) < drifting
        self._past = np.full((rules.history, count), math.nan)
        self._seen = np.zeros(count, dtype=int)
        self._first = np.full((rules.warmup, count), math.nan)
        self._strange = np.full((rules.warmup, count), math.nan)
        self._strange_count = np.zeros(count, dtype=int)
        self._usual, self._start, self._now = (np.full(count, math.nan) for _ in range(3))
        self._last = np.full(count, math.nan)
        self._age = rules.warmup
        self._clock = 0
        self._reported = np.full(count, -(10**9))

    def add(self, values: Array) -> list[Move]:
        """Compare new values with the past, then remember them; a value that is not finite is passed over."""
        self._clock += 1
        self._age += 1
        if self._age >= self.rules.warmup:
            self._renew()
        finite = np.isfinite(values)
        distance = np.abs(np.where(finite, values - self._usual, 0.0))
        judged = finite & (self._seen >= self.rules.warmup)
        # what moves steadily, as in early training, is no spike: it may become a drift
        sudden = (np.abs(values - self._last) > 0.25 * distance) | (self._strange_count > 0)
        spiked = self._spikes(values, judged & sudden & (distance > self._jumps), distance)
        self._last = np.where(finite, values, self._last)
        drifted = self._drifts(judged)
        sure = (distance > self._certain) | (self._strange_count > 0)
        normal = finite.copy()
        normal[list(spiked)] = False
        self._remember(values, np.flatnonzero(normal))
        began = self._strange_count > 0
        self._set_aside(values, list(spiked))
        moves = [
            self._move(
                i, "spike", values[i], self._usual[i], size, late=bool(began[i] and distance[i] <= self._certain[i])
            )
            for i, size in spiked.items()
            if sure[i]
        ]
        moves += [
            self._move(i, "drift", self._now[i], self._start[i], abs(self._now[i] - self._start[i]) / self.rules.drift)
            for i in drifted
            if i not in spiked
        ]
        return moves

    def _move(self, index: int, what: str, value: float, usual: float, size: float, late: bool = False) -> Move:
        fresh = bool(self._clock - self._reported[index] > self.rules.warmup)
        self._reported[index] = self._clock  # as long as it stays it is not news
        return Move(index, what, float(value), float(usual), float(size), fresh, late)

    def _renew(self) -> None:
        """Medians; they move slowly, so every few records are enough."""
        if self._seen.max(initial=0) < self.rules.warmup:
            return
        self._age = 0
        self._usual, self._start = _median(self._past), _median(self._first)
        newest = (self._seen - 1 - np.arange(self.rules.warmup)[:, None]) % self.rules.history
        self._now = _median(np.take_along_axis(self._past, newest, axis=0))

    def _spikes(self, values: Array, suspected: Array, distance: Array) -> dict[int, float]:
        where = np.flatnonzero(suspected)
        if not len(where):
            return {}
        spread = 1.4826 * _median(np.abs(self._past[:, where] - self._usual[where]))
        least = self._jumps[where] / self.rules.deviations
        sizes = distance[where] / np.maximum(spread, least)
        return {int(i): float(size) for i, size in zip(where, sizes, strict=True) if size > self.rules.deviations}

    def _drifts(self, judged: Array) -> list[int]:
        long = judged & (self._seen >= 2 * self.rules.warmup) & self._drifting
        with np.errstate(invalid="ignore"):
            return [int(i) for i in np.flatnonzero(long & (np.abs(self._now - self._start) > self.rules.drift))]

    def _remember(self, values: Array, where: Array) -> None:
        seen = self._seen[where]
        self._past[seen % self.rules.history, where] = values[where]
        new = seen < self.rules.warmup
        self._first[seen[new], where[new]] = values[where[new]]
        self._seen[where] += 1
        self._strange_count[where] = 0

    def _set_aside(self, values: Array, where: list[int]) -> None:
        for i in where:
            self._strange[self._strange_count[i], i] = values[i]
            self._strange_count[i] += 1
            if self._strange_count[i] == self.rules.warmup:
                self._past[:, i] = math.nan
                self._past[: self.rules.warmup, i] = self._strange[:, i]
                self._seen[i], self._strange_count[i] = self.rules.warmup, 0
                self._age = self.rules.warmup


def _median(columns: Array) -> Array:
    """Median of every column over what is not NaN; NaN for a column without."""
    ordered = np.sort(columns, axis=0)  # NaN comes last
    count = np.isfinite(ordered).sum(axis=0)
    place = np.arange(columns.shape[1])
    low, high = ordered[np.maximum(count - 1, 0) // 2, place], ordered[np.minimum(count // 2, len(columns) - 1), place]
    found: Array = np.where(count > 0, (low + high) / 2, math.nan)
    return found
