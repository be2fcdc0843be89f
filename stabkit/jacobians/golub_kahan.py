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

from stabkit.jacobians.orthonormal import extend, random_rows
from stabkit.jacobians.products import BudgetSpentError, Products, rounding


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


class Bidiagonalisation:
    """One sample: J V = U B and J^T U = V B^T + V_next E, with V and U stored as rows; needs m >= n."""

    def __init__(self, m: int, n: int, size: int, block: int, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.V = torch.zeros(min(n, size + block), n, dtype=torch.float64, device=device)
        self.U = torch.zeros(min(n, size), m, dtype=torch.float64, device=device)
        self.B = np.zeros((len(self.U), len(self.U)))
        self.E = np.zeros((block, len(self.U)))
        self.block = block
        self.size = 0
        self._start()

    def _start(self) -> None:
        """Random directions, orthogonal to what is there, become the next block."""
        self.width = min(self.block, self.V.shape[1] - self.size)
        rows = random_rows(self.width, self.V.shape[1], self.generator, self.V.device)
        self.V[self.size : self.size + self.width] = extend(self.V[: self.size], rows, self.width, self.generator)[2]

    @property
    def complete(self) -> bool:
        """The space is exhausted: B has all singular values of J."""
        return self.size == self.V.shape[1]

    @property
    def full(self) -> bool:
        """The next block does not fit: a restart is due."""
        return self.size + self.width > len(self.U)

    def next_block(self) -> Tensor:
        """The rows of V to be multiplied by J."""
        return self.V[self.size : self.size + self.width]

    def forward(self, JV: Tensor) -> Tensor:
        """Take J V for the next block; returns the new rows of U, to be multiplied by J^T."""
        old, new = slice(0, self.size), slice(self.size, self.size + self.width)
        C, R, self.U[new] = extend(self.U[old], JV, self.width, self.generator)
        self.B[old, new] = C.T.cpu().numpy()
        self.B[new, new] = R.T.cpu().numpy()
        return self.U[new]

    def adjoint(self, JTU: Tensor) -> None:
        """Take J^T U for the rows that ``forward`` returned; the next block is ready."""
        end = self.size + self.width
        width = min(self.width, self.V.shape[1] - end)
        self.E[:] = 0
        _, S, block = extend(self.V[:end], JTU, width, self.generator)
        self.E[:width, self.size : end] = S.T.cpu().numpy()
        self.V[end : end + width] = block
        self.size, self.width = end, width

    def svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """P, values (descending), Q of B, and the residual of each triple."""
        p = self.size
        P, values, Qt = np.linalg.svd(self.B[:p, :p])
        return P, values, Qt.T, np.linalg.norm(self.E[:, :p] @ P, axis=0)

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
        self.size = keep
        if deflate:
            self._start()
        else:
            self.E[:, :keep] = E
            self.V[keep : keep + self.width] = block

    def triples(self, columns: np.ndarray, settled: bool) -> Triples:
        """The triples ``columns`` of B's SVD as vectors of J."""
        P, values, Q, _ = self.svd()
        left = torch.from_numpy(P[:, columns].T.copy()).to(self.U) @ self.U[: self.size]
        right = torch.from_numpy(Q[:, columns].T.copy()).to(self.V) @ self.V[: self.size]
        return Triples(values[columns], left, right, float(values.max(initial=0.0)), settled)


class _Search:
    """Steers one sample: when to test, restart, look for missed copies, and stop."""

    def __init__(self, state: Bidiagonalisation, k: int, smallest: bool, tol: float, noise: float) -> None:
        self.state = state
        self.k = k
        self.smallest = smallest
        self.tol = tol
        self.noise = noise
        self.locked: np.ndarray | None = None
        self.next_test = k
        self.settled = False

    def wanted(self, values: np.ndarray, count: int) -> np.ndarray:
        order = np.arange(len(values))  # descending already
        return order[::-1][:count] if self.smallest else order[:count]

    def advance(self) -> None:
        """After a block: test convergence, restart, or look again from a random block."""
        state = self.state
        if state.complete:
            self.settled = True
        if self.settled or not (state.size >= self.next_test or state.full):
            return
        _, values, _, residuals = state.svd()
        scale = float(values[0])
        best = self.wanted(values, self.k)
        goal = self.tol * scale
        if self.smallest:  # values below the tolerance must be told apart too, as far as rounding allows
            goal = min(goal, max(0.01 * float(values[best[-1]]), 0.4 * self.noise * scale))
        found = len(best) == self.k and bool((residuals[best] <= goal).all())
        error = float(residuals[best].max()) + self.noise * scale
        if found and (self.locked is None or np.abs(values[best] - self.locked).max() > error):
            self.locked = values[best]
            state.restart(best, deflate=True)
        elif found and self._looked(values, residuals, goal):
            self.settled = True
        elif state.full:
            room = len(state.U)
            state.restart(self.wanted(values, min(self.k + (room - self.k) // 3, room - state.width)), deflate=False)
        self.next_test = min(state.size + max(10, state.size // 6), len(state.U) - state.width + 1)

    def _looked(self, values: np.ndarray, residuals: np.ndarray, goal: float) -> bool:
        """Whether the best value outside the locked ones is known well enough not to outrank them."""
        ranked = self.wanted(values, self.k + 1)
        if len(ranked) <= self.k:
            return False
        last, runner_up = ranked[-2:]
        gap = abs(float(values[last] - values[runner_up]))
        return bool(residuals[runner_up] <= max(gap / 2, goal))


def golub_kahan(
    products: Products, k: int, *, smallest: bool, tol: float, seed: int, size: int, block: int = 1
) -> tuple[list[Triples], str]:
    """Search ``k`` extremal singular triples of every sample, one block of products for all samples at a time.

    Args:
        products: the operator, with m >= n, and its budget.
        k: how many triples.
        smallest: the smallest instead of the largest.
        tol: residual, as a fraction of the norm, at which a triple counts as found.
        seed: of the random start blocks.
        size: the largest dimension of the Krylov spaces before a restart.
        block: vectors a block; one costs the fewest products, and the second look finds multiple values anyway.

    Returns:
        The triples of each sample, in the order asked for (fewer than ``k`` when the budget ended first), and
        why the search stopped.
    """
    batch, m, n = products.J.shape
    states = [Bidiagonalisation(m, n, size, block, products.device, seed) for _ in range(batch)]
    searches = [_Search(state, k, smallest, tol, 20 * rounding(products.J)) for state in states]
    stopped = "done"
    try:
        while not all(search.settled for search in searches):
            _step(products, searches, block)
    except BudgetSpentError:
        stopped = "budget"
    except KeyboardInterrupt:
        stopped = "interrupted"
    found = []
    for search in searches:
        values = search.state.svd()[1]
        found.append(search.state.triples(search.wanted(values, k), search.settled))
    return found, stopped


def _step(products: Products, searches: list[_Search], block: int) -> None:
    """One block for every sample that still searches; the others take part with zeros."""
    batch, m, n = products.J.shape
    active = [(s, search.state) for s, search in enumerate(searches) if not search.settled]
    if products.remaining() < 2 * block:
        raise BudgetSpentError
    V = torch.zeros(batch, block, n, dtype=torch.float64, device=products.device)
    for s, state in active:
        V[s, : state.width] = state.next_block()
    JV = products.forward(V)
    U = torch.zeros(batch, block, m, dtype=torch.float64, device=products.device)
    for s, state in active:
        U[s, : state.width] = state.forward(JV[s, : state.width])
    JTU = products.adjoint(U)
    for s, state in active:
        state.adjoint(JTU[s, : state.width])
        searches[s].advance()
