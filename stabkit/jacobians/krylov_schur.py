"""Block Arnoldi with Krylov-Schur restarts for a few eigenvalues of a large real operator.

G. W. Stewart, SIAM J. Matrix Anal. Appl. 23 (2002) 601; blocks after Y. Zhou, Y. Saad, Numer. Algorithms 47
(2008) 341. Random blocks, also after convergence, find the copies of a multiple eigenvalue that a single
start vector cannot see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.jacobians.counted_products import CountedProducts, rounding
from stabkit.jacobians.orthonormal import KrylovBasis, extend
from stabkit.jacobians.search import BLOCK, Ranking, Search, next_blocks, search_all
from stabkit.threads import single_threaded

# badness of an eigenvalue: the smaller, the more it is wanted; equal for a conjugate pair
Badness = Callable[[np.ndarray], np.ndarray]

EDGES: dict[str, Badness] = {
    "LM": lambda z: -np.abs(z),
    "LR": lambda z: -np.real(z),
    "SR": lambda z: np.real(z),
}


@dataclass
class Pairs:
    """Ritz pairs of one sample.

    ``values (k,)`` complex, unit rows ``vectors (k, n)`` complex, ``residuals (k,)`` as the recurrence gives
    them, ``conditions (k,)`` the condition numbers in the projected matrix (they can be too small), ``norm`` a
    lower bound of ||J||_2, ``settled`` where a second look from a random block found no more.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    conditions: np.ndarray
    norm: float
    settled: bool


class Arnoldi(KrylovBasis):
    """One sample: J V = V T + V_next B, stored as H = [T; B], with the basis as rows."""

    def __init__(self, n: int, size: int, block: int, device: torch.device, seed: int) -> None:
        super().__init__(n, size, block, device, seed)
        self.H = np.zeros((len(self.V), self.capacity))
        self._ritz: tuple[np.ndarray, np.ndarray, np.ndarray, float] | None = None

    def absorb(self, JV: Tensor) -> None:
        """Take J V for the next block; a new next block is ready."""
        old, (end, width) = self.size, self.following()
        C, R, block = extend(self.V[:end], JV, width, self.generator)
        self.H[:end, old:end] = C.T.cpu().numpy()
        self.H[end : end + width, old:end] = R.T.cpu().numpy()
        self.size, self._ritz = end, None
        self.place(block)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Ritz values, unit eigenvectors of T (columns), residuals, and the norm of [T; B]."""
        p = self.size
        if p == 0:
            return np.zeros(0, complex), np.zeros((0, 0), complex), np.zeros(0), 0.0
        if self._ritz is None:
            with single_threaded(p):
                values, S = np.linalg.eig(self.H[:p, :p])
                residuals = np.linalg.norm(self.H[p : p + self.width, :p] @ S, axis=0)
                self._ritz = values, S, residuals, float(np.linalg.norm(self.H[: p + self.width, :p], 2))
        return self._ritz

    def restart(self, badness: Badness, keep: int, *, deflate: bool) -> None:
        """Keep the Schur vectors of the ``keep`` most wanted values (a conjugate pair is never split)."""
        import scipy.linalg

        p, block = self.size, self.next_block().clone()
        with single_threaded(p):
            T, Z = scipy.linalg.schur(self.H[:p, :p], output="real")
            chosen = _closed_choice(_schur_values(T), badness, keep, self.room - 2 * self.block)
            T, Z, _, _, keep, *_ = scipy.linalg.lapack.dtrsen(chosen, T, Z, job="N")
        keep += int(keep < p and T[keep, keep - 1] != 0)  # only where close values refused to be swapped
        coupling = self.H[p : p + self.width, :p] @ Z[:, :keep]
        self.V[:keep] = torch.from_numpy(Z[:, :keep].T.copy()).to(self.V) @ self.V[:p]
        self.H[:] = 0
        self.H[:keep, :keep] = T[:keep, :keep]
        self.size, self._ritz = keep, None
        if deflate:
            self.random_block()
        else:
            self.H[keep : keep + self.width, :keep] = coupling
            self.place(block)

    def pairs(self, badness: Badness, count: int, settled: bool) -> Pairs:
        """The ``count`` most wanted Ritz pairs as vectors of J."""
        values, S, residuals, norm = self.ritz()
        best = order(values, badness)[:count]
        rows = torch.from_numpy(S[:, best].T.astype(complex)).to(self.V.device)
        vectors = torch.complex(rows.real @ self.V[: self.size], rows.imag @ self.V[: self.size])
        conditions = _left_norms(S, best)
        return Pairs(values[best].astype(complex), vectors, residuals[best], conditions, norm, settled)


def _left_norms(S: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Norms of the rows ``columns`` of S^-1, which are left eigenvectors; ``inf`` where S is singular."""
    unit = np.eye(len(S))[:, columns]
    try:
        with single_threaded(len(S)):
            norms: np.ndarray = np.linalg.norm(np.linalg.solve(S.T, unit), axis=0)
    except np.linalg.LinAlgError:
        return np.full(len(columns), np.inf)
    return np.where(np.isfinite(norms), norms, np.inf)


def _schur_values(T: np.ndarray) -> np.ndarray:
    """Eigenvalues along the diagonal of a real quasi-triangular matrix in LAPACK's standard form."""
    values = T.diagonal().astype(complex)
    for i in np.flatnonzero(T.diagonal(-1)):
        root = 1j * np.sqrt(abs(T[i, i + 1])) * np.sqrt(abs(T[i + 1, i]))
        values[i] += root
        values[i + 1] -= root
    return values


def _closed_choice(values: np.ndarray, badness: Badness, keep: int, limit: int) -> np.ndarray:
    """Marks the ``keep`` most wanted values and the partners of conjugate pairs, never more than ``limit``."""
    chosen = np.zeros(len(values), dtype=np.int32)
    for i in order(values, badness):
        pair = [i] if values[i].imag == 0 else [i, i + 1] if values[i].imag > 0 else [i - 1, i]
        if chosen.sum() >= keep or chosen.sum() + len(pair) > limit:
            break
        chosen[pair] = 1
    return chosen


def order(values: np.ndarray, badness: Badness) -> np.ndarray:
    """Indices from the most to the least wanted; of a conjugate pair the positive imaginary part first."""
    scale = float(np.abs(values).max(initial=0.0)) or 1.0
    level = np.round(badness(values) / (1e-12 * scale))  # rounding must not separate a pair
    return np.lexsort((-values.imag, level))


class _Search(Search):
    """For the ``k`` most wanted eigenvalues of one sample."""

    state: Arnoldi

    def __init__(self, state: Arnoldi, k: int, badness: Badness, tol: float, noise: float, look: bool) -> None:
        super().__init__(state, k, noise, look=look, gap=0.25, spacing=0.12)
        self.badness = badness
        self.tol = tol

    def ranking(self) -> Ranking:
        values, _, residuals, scale = self.state.ritz()
        best = order(values, self.badness)
        goal = self.tol * scale
        return Ranking(values[best], residuals[best], self.badness(values[best]), goal, goal, scale)

    def restart(self, ranking: Ranking, count: int, *, deflate: bool) -> None:
        self.state.restart(self.badness, count, deflate=deflate)


def krylov_schur(
    products: CountedProducts,
    k: int,
    *,
    badness: Badness,
    tol: float,
    seed: int,
    size: int,
    look: bool = True,
) -> tuple[list[Pairs], str]:
    """Search the ``k`` most wanted eigenpairs of every sample, one block of products for all at a time.

    Args:
        products: the operator, with its budget.
        k: how many pairs.
        badness: what is wanted.
        tol: residual, as a fraction of the norm, at which a pair counts as found.
        seed: the seed of the random start blocks.
        size: the largest dimension of the Krylov space before a restart.
        look: look for copies that the start vectors cannot see, where there may be any.

    Returns:
        The pairs of each sample, most wanted first (fewer than ``k`` when the budget ended first), and why the
        search stopped.
    """
    batch, _, n = products.J.shape
    states = [Arnoldi(n, size, BLOCK, products.device, seed) for _ in range(batch)]

    def wanted(sample: int) -> Badness:
        def scaled(values: np.ndarray) -> np.ndarray:
            unit = products.unit(sample)  # known once the first product is made
            return badness(values * unit) / unit

        return scaled

    searches = [_Search(state, k, wanted(s), tol, 20 * rounding(products.J), look) for s, state in enumerate(states)]

    def step() -> None:
        JV = products.forward(next_blocks(products, searches))
        for s, search in enumerate(searches):
            if not search.settled:
                search.state.absorb(JV[s, : search.state.width])
                search.advance()

    stopped = search_all(searches, step)
    return [search.state.pairs(search.badness, k, search.settled) for search in searches], stopped


def arnoldi(products: CountedProducts, size: int, seed: int) -> list[np.ndarray]:
    """Plain Arnoldi of ``size`` steps with one random start vector: the Hessenberg matrix of each sample.

    Returns:
        ``(size + 1, size)`` per sample, with J V_size = V_{size+1} H.
    """
    batch, _, n = products.J.shape
    states = [Arnoldi(n, size, 1, products.device, seed) for _ in range(batch)]
    while not states[0].full:
        JV = products.forward(torch.stack([state.next_block() for state in states]))
        for state, image in zip(states, JV, strict=True):
            state.absorb(image)
    return [state.H * products.unit(s) for s, state in enumerate(states)]
