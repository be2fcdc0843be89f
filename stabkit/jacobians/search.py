"""When a Krylov search has found what was asked for, and whether copies of a value may have been missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.jacobians.counted_products import BudgetSpentError, CountedProducts
from stabkit.jacobians.orthonormal import KrylovBasis

# Vectors that a search multiplies at once. One takes the fewest products to converge, but then always as many again to
# look for copies of what it found; two see pairs at once.
BLOCK = 2
# Tests are made whenever the residual should have halved, whatever the tolerance: a search with a looser one sees the
# same Ritz values at the same steps, and can only stop sooner.
_BETWEEN_TESTS = 0.5
_LONGEST_PAUSE = 6  # a test at the latest when the basis has grown by one part in so many
# A basis of 3 k + 56 rows takes hardly more products than one without restarts and half the time for everything else;
# where it does not get there soon, more room pays.
_FIRST_ROOM, _GROWTH = 56, 1.25


@dataclass
class Ranking:
    """What the projected matrix says, best first.

    ``values`` and their ``residuals``; ``badness``, the smaller the more wanted; ``goal``, the residual at which a
    value counts as found; ``finest``, the one at which values that still agree are taken for copies; ``scale``, a lower
    bound of ||J||_2.
    """

    values: np.ndarray
    residuals: np.ndarray
    badness: np.ndarray
    goal: float
    finest: float
    scale: float


class Search:
    """Steers one sample: when to test, restart, look for missed copies, and stop.

    A Krylov space from ``block`` random vectors holds up to ``block`` copies of a multiple value, and all of them
    where there are fewer. So only where ``block`` of the values found agree may there be more: the found ones are then
    locked, and the search goes on from random vectors orthogonal to them until nothing new appears. To a loose
    tolerance, values that are merely close agree as well. More steps tell these apart, and cost less than a second
    search; so they are locked only once their residuals are as small as the finest tolerance asks for.

    Args:
        state: the growing basis.
        k: how many values.
        noise: relative rounding error of a product, with a margin.
        look: whether to look for more copies at all.
        gap: the part of the distance to the best value not asked for that this one's residual may have.
        spacing: the least distance between tests, as a part of the size of the basis.
    """

    def __init__(self, state: KrylovBasis, k: int, noise: float, *, look: bool, gap: float, spacing: float) -> None:
        state.room = min(state.capacity, 3 * k + _FIRST_ROOM)
        self.state = state
        self.k = k
        self.noise = noise
        self.look = look
        self.gap = gap
        self.kept = k
        self.spacing = spacing
        self.spent = 0
        self.next_test = 2 * k
        self.settled = False
        self.locked: np.ndarray | None = None
        self._last: tuple[int, float] | None = None

    def ranking(self) -> Ranking:
        """The Ritz values of the state, best first."""
        raise NotImplementedError

    def restart(self, ranking: Ranking, count: int, *, deflate: bool) -> None:
        """Keep the best ``count``; ``deflate`` goes on from random vectors."""
        raise NotImplementedError

    def advance(self) -> None:
        """After a block: test convergence, restart, or look again from a random block."""
        state = self.state
        self.spent += state.block
        if state.complete:
            self.settled = True
        if self.settled or not (self.spent >= self.next_test or state.full):
            return
        ranking = self.ranking()
        worst = float(ranking.residuals[: self.k].max(initial=0.0))
        self.next_test = self.spent + self._steps(worst)
        found = len(ranking.values) >= self.k and worst <= ranking.goal
        crowded = found and self.look and self._may_have_copies(ranking, worst)
        if crowded and (self.locked is not None or worst <= ranking.finest):
            self.locked = ranking.badness[: self.k]
            self.restart(ranking, self.k, deflate=True)
            self.kept = state.size  # k + 1 where the last one is half of a conjugate pair
        elif found and not crowded and (not self.look or self._outranks(ranking)):
            self.settled = True
        else:
            self._make_room(ranking)

    def _make_room(self, ranking: Ranking) -> None:
        """Restart from the best, where the next block would not fit."""
        state = self.state
        if state.full:
            self.restart(ranking, self.k + (state.room - self.k) // 3, deflate=False)
            state.room = min(state.capacity, int(_GROWTH * state.room))

    def _may_have_copies(self, ranking: Ranking, worst: float) -> bool:
        """Whether there may be more copies: a full house of equal values, or new ones since the last look."""
        if self.locked is not None:
            error = worst + self.noise * ranking.scale
            return bool(np.abs(ranking.badness[: self.k] - self.locked).max() > error)
        values = ranking.values[: self.k + 1]
        resolution = max(100 * min(ranking.goal, ranking.finest), 4 * worst) + self.noise * ranking.scale
        copies = (np.abs(values[:, None] - values[None, :]) <= resolution).sum(1)
        return bool(copies.max() >= self.state.block)

    def _outranks(self, ranking: Ranking) -> bool:
        """Whether the best value outside the wanted ones is known well enough not to outrank them."""
        if len(ranking.values) <= self.kept:
            return False
        distance = float(ranking.badness[self.kept] - ranking.badness[self.k - 1])
        return bool(ranking.residuals[self.kept] <= max(self.gap * distance, ranking.goal))

    def _steps(self, worst: float) -> int:
        """Vectors until the next test, from how fast the residuals have fallen."""
        size, needed = self.state.size, np.inf
        if self._last is not None and 0 < worst < self._last[1]:
            rate = np.log(self._last[1] / worst) / (self.spent - self._last[0])
            needed = np.log(1 / _BETWEEN_TESTS) / rate
        self._last = (self.spent, worst)
        least = max(4, int(self.spacing * size))
        return int(np.clip(needed, least, max(least, size // _LONGEST_PAUSE)))


def search_all(searches: Sequence[Search], step: Callable[[], None]) -> str:
    """Take steps until every sample is settled; why that ended: ``"done"``, ``"budget"`` or ``"interrupted"``."""
    try:
        while not all(search.settled for search in searches):
            step()
    except BudgetSpentError:
        return "budget"
    except KeyboardInterrupt:
        return "interrupted"
    return "done"


def next_blocks(products: CountedProducts, searches: Sequence[Search]) -> Tensor:
    """One block for every sample that still searches; the others take part with zeros: ``(batch, block, n)``."""
    batch, _, n = products.J.shape
    V = torch.zeros(batch, BLOCK, n, dtype=torch.float64, device=products.device)
    for s, search in enumerate(searches):
        if not search.settled:
            V[s, : search.state.width] = search.state.next_block()
    return V
