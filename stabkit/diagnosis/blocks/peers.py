"""How far one value lies from those of its peers, judged so that the fault itself does not blur the measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
        company: share of the others that lie nearer to this value than to the typical one.
    """

    value: float
    typical: float
    spread: float
    peers: int
    company: float = 0.0

    @property
    def size(self) -> float:
        """The value less the typical one, nats; -inf for nothing among something."""
        if self.value == self.typical:
            return 0.0
        return self.value - self.typical

    def exceeds(self, smallest: float, sigmas: float) -> bool:
        """Whether the deviation is both large and far outside the spread."""
        if self.company > _COMPANY:
            return False  # blocks of two kinds that take turns, and no fault
        if self.size == -math.inf:
            return math.isfinite(self.typical)
        return math.isfinite(self.size) and abs(self.size) > max(smallest, sigmas * self.spread)


def deviation(values: Sequence[float], index: int) -> Deviation:
    """Where one of several values lies beside the others.

    Example:
        >>> far = deviation([0.1, 0.0, 3.0, -0.1, 0.0], 2)
        >>> far.typical, far.size, far.exceeds(1.0, 6.0)
        (0.0, 3.0, True)
    """
    others = np.delete(np.asarray(values, dtype=float), index)
    others = others[~np.isnan(others)]
    if not others.size:
        return Deviation(values[index], math.nan, math.inf, 0)
    typical = _median(others)
    if not math.isfinite(typical):
        return Deviation(values[index], typical, math.inf, len(others))
    spread = _NORMAL * _median(np.abs(others - typical))
    value = values[index]
    with np.errstate(invalid="ignore"):
        alike = (others == value) | (np.abs(others - value) < np.abs(others - typical))
    return Deviation(value, typical, max(spread, FLOOR), len(others), float(alike.mean()))


def _median(values: npt.NDArray[np.float64]) -> float:
    """The median of some numbers; numpy's own takes ten times as long on a few, and a diagnosis asks thousands."""
    ordered, half = np.sort(values), len(values) // 2
    return float(ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def nearest_to_peers(found: Sequence[Deviation]) -> Deviation:
    """Of several readings of one deviation, those in which the peers agree best, and of these the mildest."""
    closest = min(d.spread for d in found)
    agreed = [d for d in found if d.spread <= closest + FLOOR]
    return min(agreed, key=lambda d: abs(d.size) if not math.isnan(d.size) else math.inf)
