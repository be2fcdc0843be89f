"""Block Golub-Kahan bidiagonalisation with full reorthogonalisation and thick restart.

G. Golub, W. Kahan, SIAM J. Numer. Anal. B 2 (1965) 205; restarts after J. Baglama, L. Reichel,
SIAM J. Sci. Comput. 27 (2005) 19. Neither J^T J nor J J^T is ever applied as one operator, so that small
singular values keep their digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.jacobians.counted_products import BudgetSpentError, CountedProducts, rounding
from stabkit.jacobians.orthonormal import KrylovBasis, extend
from stabkit.jacobians.search import BLOCK, Ranking, Search, next_blocks, search_all
from stabkit.threads import single_threaded


@dataclass
class Triples:
    """Approximate singular triples of one sample.

    ``values (k,)``, rows ``left (k, m)`` and ``right (k, n)``, ``norm`` a lower bound of ||J||_2, ``settled``
    where a second look from a random block found no more.
    """

    values: np.ndarray
    left: Tensor
    right: Tensor
    norm: float
    settled: bool


class Bidiagonalisation(KrylovBasis):
    """One sample: J V = U B and J^T U = V B^T + V_next E, with V and U stored as rows; needs m >= n."""

    def __init__(self, m: int, n: int, size: int, block: int, device: torch.device, seed: int) -> None:
        super().__init__(n, size, block, device, seed)
        self.U = torch.empty(self.capacity, m, dtype=torch.float64, device=device)
        self.B = np.zeros((self.capacity, self.capacity))
        self.E = np.zeros((block, self.capacity))
        self._svd: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None

    def forward(self, JV: Tensor) -> Tensor:
        """Take J V for the next block; returns the new rows of U, to be multiplied by J^T."""
        old, new = slice(0, self.size), slice(self.size, self.size + self.width)
        C, R, self.U[new] = extend(self.U[old], JV, self.width, self.generator, recent=2 * self.block)
        self.B[old, new] = C.T.cpu().numpy()
        self.B[new, new] = R.T.cpu().numpy()
        return self.U[new]

    def adjoint(self, JTU: Tensor) -> None:
        """Take J^T U for the rows that ``forward`` returned; the next block is ready."""
        old, (end, width) = self.size, self.following()
        _, S, block = extend(self.V[:end], JTU, width, self.generator, recent=2 * self.block)
        self.E[:] = 0
        self.E[:width, old:end] = S.T.cpu().numpy()
        self.size = end
        self.place(block)
        self._svd = None

    def svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """P, values (descending), Q of B, and the residual of each triple."""
        if self._svd is None:
            p = self.size
            with single_threaded(p):
                P, values, Qt = np.linalg.svd(self.B[:p, :p])
                self._svd = P, values, Qt.T, np.linalg.norm(self.E[:, :p] @ P, axis=0)
        return self._svd

    def restart(self, columns: np.ndarray, *, deflate: bool) -> None:
        """Keep the triples ``columns`` of B's SVD; ``deflate`` replaces the next block by a random one."""
        P, values, Q, _ = self.svd()
        P, Q, keep = P[:, columns], Q[:, columns], len(columns)
        old, block = self.size, self.next_block().clone()
        E = self.E[:, :old] @ P
        self.U[:keep] = torch.from_numpy(P.T.copy()).to(self.U) @ self.U[:old]
        self.V[:keep] = torch.from_numpy(Q.T.copy()).to(self.V) @ self.V[:old]
        self.B[:], self.E[:] = 0, 0
        self.B[np.arange(keep), np.arange(keep)] = values[columns]
        self.size, self._svd = keep, None
        if deflate:
            self.random_block()
        else:
            self.E[:, :keep] = E
            self.place(block)

    def triples(self, columns: np.ndarray, settled: bool) -> Triples:
        """The triples ``columns`` of B's SVD as vectors of J."""
        P, values, Q, _ = self.svd()
        left = torch.from_numpy(P[:, columns].T.copy()).to(self.U) @ self.U[: self.size]
        right = torch.from_numpy(Q[:, columns].T.copy()).to(self.V) @ self.V[: self.size]
        return Triples(values[columns], left, right, float(values.max(initial=0.0)), settled)


class _Search(Search):
    """For the ``k`` largest or smallest triples of one sample."""

    state: Bidiagonalisation

    def __init__(
        self, state: Bidiagonalisation, k: int, smallest: bool, tol: float, finest: float, noise: float
    ) -> None:
        super().__init__(state, k, noise, look=True, gap=0.5, spacing=0.03)
        self.smallest = smallest
        self.tol = tol
        self.finest = finest

    def wanted(self, values: np.ndarray, count: int) -> np.ndarray:
        order = np.arange(len(values))  # descending already
        return order[::-1][:count] if self.smallest else order[:count]

    def ranking(self) -> Ranking:
        _, values, _, residuals = self.state.svd()
        best, scale = self.wanted(values, len(values)), float(values[0])
        goal, finest = self.tol * scale, self.finest * scale
        if self.smallest:  # values below the tolerance must be told apart too, as far as rounding allows
            last = float(values[best[: self.k]][-1])
            apart = max(0.01 * last, 0.4 * self.noise * scale)
            goal, finest = min(goal, apart), min(finest, apart)
        ranked = values[best]
        return Ranking(ranked, residuals[best], ranked if self.smallest else -ranked, goal, finest, scale)

    def restart(self, ranking: Ranking, count: int, *, deflate: bool) -> None:
        count = min(count, self.state.room - self.state.width)
        self.state.restart(self.wanted(ranking.values, count), deflate=deflate)


def golub_kahan(
    products: CountedProducts,
    k: int,
    *,
    smallest: bool,
    tol: float,
    finest: float,
    seed: int,
    size: int,
) -> tuple[list[Triples], str]:
    """Search ``k`` extremal singular triples of every sample, one block of products for all samples at a time.

    Args:
        products: the operator, with m >= n, and its budget.
        k: how many triples.
        smallest: the smallest instead of the largest.
        tol: residual, as a fraction of the norm, at which a triple counts as found.
        finest: residual below which close values are taken for copies of one; at most ``tol``.
        seed: the seed of the random start blocks.
        size: the largest dimension of the Krylov spaces before a restart.

    Returns:
        The triples of each sample, in the order asked for (fewer than ``k`` when the budget ended first), and
        why the search stopped.
    """
    batch, m, n = products.J.shape
    states = [Bidiagonalisation(m, n, size, BLOCK, products.device, seed) for _ in range(batch)]
    searches = [_Search(state, k, smallest, tol, finest, 20 * rounding(products.J)) for state in states]
    stopped = search_all(searches, lambda: _step(products, searches))
    found = []
    for search in searches:
        values = search.state.svd()[1]
        found.append(search.state.triples(search.wanted(values, k), search.settled))
    return found, stopped


def _step(products: CountedProducts, searches: list[_Search]) -> None:
    """One block of products with J and one with J^T."""
    batch, m, _ = products.J.shape
    active = [(s, search.state) for s, search in enumerate(searches) if not search.settled]
    if products.remaining() < 2 * BLOCK:
        raise BudgetSpentError
    JV = products.forward(next_blocks(products, searches))
    U = torch.zeros(batch, BLOCK, m, dtype=torch.float64, device=products.device)
    for s, state in active:
        U[s, : state.width] = state.forward(JV[s, : state.width])
    JTU = products.adjoint(U)
    for s, state in active:
        state.adjoint(JTU[s, : state.width])
        searches[s].advance()
