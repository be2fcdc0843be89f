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

from stabkit.jacobians.orthonormal import extend, random_rows
from stabkit.jacobians.products import BudgetSpentError, Products, rounding

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


class _Arnoldi:
    """One sample: J V = V T + V_next B, stored as H = [T; B], with the basis as rows."""

    def __init__(self, n: int, size: int, block: int, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.V = torch.zeros(min(n, size + block), n, dtype=torch.float64, device=device)
        self.H = np.zeros((len(self.V), min(n, size)))
        self.block = block
        self.size = 0
        self._start()

    def _start(self) -> None:
        self.width = min(self.block, self.V.shape[1] - self.size)
        rows = random_rows(self.width, self.V.shape[1], self.generator, self.V.device)
        self.V[self.size : self.size + self.width] = extend(self.V[: self.size], rows, self.width, self.generator)[2]

    @property
    def complete(self) -> bool:
        return self.size == self.V.shape[1]

    @property
    def full(self) -> bool:
        return self.size + self.width > self.H.shape[1]

    def next_block(self) -> Tensor:
        return self.V[self.size : self.size + self.width]

    def absorb(self, JV: Tensor) -> None:
        """Take J V for the next block; a new next block is ready."""
        end = self.size + self.width
        width = min(self.width, self.V.shape[1] - end)
        C, R, block = extend(self.V[:end], JV, width, self.generator)
        self.H[:end, self.size : end] = C.T.cpu().numpy()
        self.H[end : end + width, self.size : end] = R.T.cpu().numpy()
        self.V[end : end + width] = block
        self.size, self.width = end, width

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Ritz values, unit eigenvectors of T (columns), residuals, and the norm of [T; B]."""
        p = self.size
        if p == 0:
            return np.zeros(0, complex), np.zeros((0, 0), complex), np.zeros(0), 0.0
        values, S = np.linalg.eig(self.H[:p, :p])
        residuals = np.linalg.norm(self.H[p : p + self.width, :p] @ S, axis=0)
        return values, S, residuals, float(np.linalg.norm(self.H[: p + self.width, :p], 2))

    def restart(self, badness: Badness, keep: int, *, deflate: bool) -> None:
        """Keep the Schur vectors of the ``keep`` most wanted values (a conjugate pair is never split)."""
        import scipy.linalg

        p, block = self.size, self.next_block().clone()
        T, Z = scipy.linalg.schur(self.H[:p, :p], output="real")
        chosen = _closed_choice(_schur_values(T), badness, keep, self.H.shape[1] - 2 * self.block)
        T, Z, _, _, keep, *_ = scipy.linalg.lapack.dtrsen(chosen, T, Z, job="N")
        keep += int(keep < p and T[keep, keep - 1] != 0)  # only where close values refused to be swapped
        coupling = self.H[p : p + self.width, :p] @ Z[:, :keep]
        self.V[:keep] = torch.from_numpy(Z[:, :keep].T.copy()).to(self.V) @ self.V[:p]
        self.H[:] = 0
        self.H[:keep, :keep] = T[:keep, :keep]
        self.size = keep
        if deflate:
            self._start()
        else:
            self.H[keep : keep + self.width, :keep] = coupling
            self.V[keep : keep + self.width] = block

    def pairs(self, badness: Badness, count: int, settled: bool) -> Pairs:
        values, S, residuals, norm = self.ritz()
        best = order(values, badness)[:count]
        rows = torch.from_numpy(S[:, best].T.astype(complex)).to(self.V.device)
        vectors = torch.complex(rows.real @ self.V[: self.size], rows.imag @ self.V[: self.size])
        conditions = np.linalg.norm(np.linalg.pinv(S), axis=1)[best]  # rows of S^-1 are the left eigenvectors
        return Pairs(values[best].astype(complex), vectors, residuals[best], conditions, norm, settled)


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


class _Search:
    """Steers one sample: when to test, restart, look for missed copies, and stop."""

    def __init__(self, state: _Arnoldi, k: int, badness: Badness, tol: float, noise: float, second_look: bool) -> None:
        self.state = state
        self.k = k
        self.badness = badness
        self.tol = tol
        self.noise = noise
        self.second_look = second_look
        self.locked: np.ndarray | None = None
        self.kept = k
        self.next_test = k + 2
        self.settled = False

    def advance(self) -> None:
        """After a block: test convergence, restart, or look again from a random block."""
        state = self.state
        if state.complete:
            self.settled = True
        if self.settled or not (state.size >= self.next_test or state.full):
            return
        values, _, residuals, scale = state.ritz()
        best = order(values, self.badness)
        wanted = best[: self.k]
        bad = self.badness(values[wanted])
        found = len(wanted) == self.k and bool((residuals[wanted] <= self.tol * scale).all())
        error = float(residuals[wanted].max()) + self.noise * scale
        if found and not self.second_look:
            self.settled = True
        elif found and (self.locked is None or np.abs(bad - self.locked).max() > error):
            self.locked = bad
            state.restart(self.badness, self.k, deflate=True)
            self.kept = state.size  # k + 1 where the last one is half of a conjugate pair
        elif found and self._looked(self.badness(values[best]), residuals[best], scale):
            self.settled = True
        elif state.full:
            room = state.H.shape[1]
            state.restart(self.badness, self.k + (room - self.k) // 3, deflate=False)
        self.next_test = min(state.size + max(10, state.size // 6), state.H.shape[1] - state.width + 1)

    def _looked(self, badness: np.ndarray, residuals: np.ndarray, scale: float) -> bool:
        """Whether the best value outside the locked ones is known well enough not to outrank them."""
        if len(badness) <= self.kept:
            return False
        gap = float(badness[self.kept] - badness[self.k - 1])
        return bool(residuals[self.kept] <= max(gap / 4, self.tol * scale))


def krylov_schur(
    products: Products,
    k: int,
    *,
    badness: Badness,
    tol: float,
    seed: int,
    size: int,
    block: int = 1,
    second_look: bool = True,
) -> tuple[list[Pairs], str]:
    """Search the ``k`` most wanted eigenpairs of every sample, one block of products for all at a time.

    Args:
        products: the operator, with its budget.
        k: how many pairs.
        badness: what is wanted.
        tol: residual, as a fraction of the norm, at which a pair counts as found.
        seed: of the random start blocks.
        size: the largest dimension of the Krylov space before a restart.
        block: vectors a block; one costs the fewest products, and the second look finds multiple values anyway.
        second_look: after convergence, continue from a random block orthogonal to what was found, until nothing
            more wanted appears.

    Returns:
        The pairs of each sample, most wanted first (fewer than ``k`` when the budget ended first), and why the
        search stopped.
    """
    batch, _, n = products.J.shape
    states = [_Arnoldi(n, size, block, products.device, seed) for _ in range(batch)]
    searches = [_Search(state, k, badness, tol, 20 * rounding(products.J), second_look) for state in states]
    stopped = "done"
    try:
        while not all(search.settled for search in searches):
            active = [(s, search.state) for s, search in enumerate(searches) if not search.settled]
            V = torch.zeros(batch, block, n, dtype=torch.float64, device=products.device)
            for s, state in active:
                V[s, : state.width] = state.next_block()
            JV = products.forward(V)
            for s, state in active:
                state.absorb(JV[s, : state.width])
                searches[s].advance()
    except BudgetSpentError:
        stopped = "budget"
    except KeyboardInterrupt:
        stopped = "interrupted"
    return [search.state.pairs(badness, k, search.settled) for search in searches], stopped


def arnoldi(products: Products, size: int, seed: int) -> list[np.ndarray]:
    """Plain Arnoldi of ``size`` steps with one random start vector: the Hessenberg matrix of each sample.

    Returns:
        ``(size + 1, size)`` per sample, with J V_size = V_{size+1} H.
    """
    batch, _, n = products.J.shape
    states = [_Arnoldi(n, size, 1, products.device, seed) for _ in range(batch)]
    while not states[0].full:
        JV = products.forward(torch.stack([state.next_block() for state in states]))
        for state, image in zip(states, JV, strict=True):
            state.absorb(image)
    return [state.H for state in states]
