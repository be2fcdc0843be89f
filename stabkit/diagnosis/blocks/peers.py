"""How far one value lies from those of its peers, judged so that the fault itself does not blur the measure."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_NORMAL = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
_COMPANY = 0.25  # share of the peers that may be as odd
FLOOR = 0.05  # spread that peers have at least, nats


@dataclass(frozen=True)
class Deviation:
    """One value beside those of its peers.

    Attributes:
        value: the quantity of the block that is compared, nats.
        typical: median of the others.
        spread: robust standard deviation of the others, at least 0.05 nats.
        peers: how many others there are.
        known: the values of all, this one among them.
    """

    value: float
    typical: float
    spread: float
    peers: int
    known: Sequence[float] = field(default=(), repr=False, compare=False)

    @property
    def size(self) -> float:
        """The value less the typical one, nats; -inf for nothing among something."""
        if self.value == self.typical:
            return 0.0
        return self.value - self.typical

    def exceeds(self, smallest: float, sigmas: float) -> bool:
        """Whether the deviation is both large and far outside the spread."""
        if self.size == -math.inf:
            far = math.isfinite(self.typical)
        else:
            far = math.isfinite(self.size) and abs(self.size) > max(smallest, sigmas * self.spread)
        return far and self.company <= _COMPANY  # else blocks of two kinds that take turns, and no fault

    @property
    def company(self) -> float:
        """Share of the others that lie nearer to this value than to the typical one."""
        if not self.known:
            return 0.0
        values = np.asarray(self.known)
        with np.errstate(invalid="ignore"):
            alike = (values == self.value) | (np.abs(values - self.value) < np.abs(values - self.typical))
        return float((alike.sum() - (not math.isnan(self.value))) / self.peers)  # itself aside


class Peers:
    """One quantity of several blocks, each of which is held against all the others.

    It is sorted once for all of them: to sort the others of each anew would cost the square of the depth.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self._values = [float(value) for value in values]
        self._known = sorted(value for value in self._values if not math.isnan(value))
        self._away: dict[float, list[float]] = {}  # distances from a typical value, in order

    def __len__(self) -> int:
        return len(self._values)

    def deviation(self, index: int) -> Deviation:
        """Where one of the values lies beside the others."""
        value = self._values[index]
        counts = not math.isnan(value)
        others = len(self._known) - counts
        if not others:
            return Deviation(value, math.nan, math.inf, 0)
        typical = _median(self._known, value if counts else None)
        if not math.isfinite(typical):
            return Deviation(value, typical, math.inf, others)
        if typical not in self._away:  # of the medians without one of the values there are three at most
            self._away[typical] = sorted(abs(other - typical) for other in self._known)
        spread = _NORMAL * _median(self._away[typical], abs(value - typical) if counts else None)
        return Deviation(value, typical, max(spread, FLOOR), others, self._known)


def deviation(values: Sequence[float], index: int) -> Deviation:
    """Where one of several values lies beside the others.

    Example:
        >>> far = deviation([0.1, 0.0, 3.0, -0.1, 0.0], 2)
        >>> far.typical, far.size, far.exceeds(1.0, 6.0)
        (0.0, 3.0, True)
    """
    return Peers(values).deviation(index)


def _median(ordered: Sequence[float], without: float | None) -> float:
    """The median of numbers in order but for one of them."""
    left = len(ordered) - (without is not None)
    skipped = len(ordered) if without is None else bisect.bisect_left(ordered, without)

    def at(place: int) -> float:
        return ordered[place + (place >= skipped)]

    half = left // 2
    return at(half) if left % 2 else (at(half - 1) + at(half)) / 2


def nearest_to_peers(found: Sequence[Deviation]) -> Deviation:
    """Of several readings of one deviation, those in which the peers agree best, and of these the mildest."""
    closest = min(d.spread for d in found)
    agreed = [d for d in found if d.spread <= closest + FLOOR]
    return min(agreed, key=lambda d: abs(d.size) if not math.isnan(d.size) else math.inf)
