"""When a Krylov search has found what was asked for, and whether copies of a value may have been missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.jacobians.counted_products import BudgetSpentError, CountedProducts
from stabkit.jacobians.orthonormal import KrylovBasis

_PATIENCE = 0.75  # of the steps that convergence seems to need: it speeds up towards the end
# A basis of 3 k + 56 rows takes hardly more products than one without restarts and half the time for everything else;
# where it does not get there soon, more room pays.
_FIRST_ROOM, _GROWTH = 56, 1.25


@dataclass
class Ranking:
    """What the projected matrix says, best first.

    ``values`` and their ``residuals``; ``badness``, the smaller the more wanted; ``goal``, the residual at which a
    value counts as found; ``scale``, a lower bound of ||J||_2.
    """

    values: np.ndarray
    residuals: np.ndarray
    badness: np.ndarray
    goal: float
    scale: float


class Search:
    """Steers one sample: when to test, restart, look for missed copies, and stop.

    A Krylov space from ``block`` random vectors holds up to ``block`` copies of a multiple value, and all of them
    where there are fewer. So only where ``block`` of the values found agree may there be more: the found ones are then
    locked, and the search goes on from random vectors orthogonal to them until nothing new appears.

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
        self.next_test = self.spent + self._steps(worst, ranking.goal)
        found = len(ranking.values) >= self.k and worst <= ranking.goal
        if found and not self.look:
            self.settled = True
        elif found and self._lock(ranking, worst):
            self.locked = ranking.badness[: self.k]
            self.restart(ranking, self.k, deflate=True)
            self.kept = state.size  # k + 1 where the last one is half of a conjugate pair
        elif found and self._outranks(ranking):
            self.settled = True
        elif state.full:
            self.restart(ranking, self.k + (state.room - self.k) // 3, deflate=False)
            state.room = min(state.capacity, int(_GROWTH * state.room))

    def _lock(self, ranking: Ranking, worst: float) -> bool:
        """Whether there may be more copies: a full house of equal values, or new ones since the last look."""
        if self.locked is not None:
            error = worst + self.noise * ranking.scale
            return bool(np.abs(ranking.badness[: self.k] - self.locked).max() > error)
        values = ranking.values[: self.k + 1]
        resolution = 100 * ranking.goal + self.noise * ranking.scale
        copies = (np.abs(values[:, None] - values[None, :]) <= resolution).sum(1)
        return bool(copies.max() >= self.state.block)

    def _outranks(self, ranking: Ranking) -> bool:
        """Whether the best value outside the wanted ones is known well enough not to outrank them."""
        if len(ranking.values) <= self.kept:
            return False
        distance = float(ranking.badness[self.kept] - ranking.badness[self.k - 1])
        return bool(ranking.residuals[self.kept] <= max(self.gap * distance, ranking.goal))

    def _steps(self, worst: float, goal: float) -> int:
        """Vectors until the next test, from how fast the residuals have fallen."""
        size, needed = self.state.size, np.inf
        if self._last is not None and goal < worst < self._last[1]:
            rate = np.log(self._last[1] / worst) / (self.spent - self._last[0])
            needed = _PATIENCE * np.log(worst / goal) / rate if goal else np.inf
        self._last = (self.spent, worst)
        least = max(4, int(self.spacing * size))
        return int(np.clip(needed, least, max(least, size // 2)))


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


def next_blocks(products: CountedProducts, searches: Sequence[Search], block: int) -> Tensor:
    """One block for every sample that still searches; the others take part with zeros: ``(batch, block, n)``."""
    batch, _, n = products.J.shape
    V = torch.zeros(batch, block, n, dtype=torch.float64, device=products.device)
    for s, search in enumerate(searches):
        if not search.settled:
            V[s, : search.state.width] = search.state.next_block()
    return V
