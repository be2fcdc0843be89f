"""The algebraically largest eigenvalues of a large symmetric operator: Lanczos with thick restarts.

K. Wu, H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602. The basis is orthogonalised in full, twice where that is
needed; the projected matrix is kept whole in float64, so that what products lack in symmetry is seen. Convergence is
looked at after every product, since one costs more than a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.curvature.conjugate import Climb, not_finite
from stabkit.threads import single_threaded

#: How much of a start vector that was found before is drawn anew: what it is orthogonal to is then found too.
DRAWN = 0.05

# Of the basis, at least and at most, without the row that is made. Three are what a climb takes up in the four vectors
# that it keeps.
_ROWS = (3, 20)
_ENOUGH = 9  # rows with which restarts cost few products: fewer make room for one between two of them
_MEMORY = 2**26  # bytes that all of them may take where more than the least are kept

Product = Callable[[Tensor, Tensor], Tensor]
_FEWEST = 4  # Ritz values before gaps between them mean something
_COLUMNS = 2**17  # as many of a few rows stay in the cache: six times as fast as 2^20
_MUCH = 0.7  # of the norm: what is left of a vector of which less was taken is orthogonal to rounding (Kahan, Parlett)
_TINY = 1e-10  # its square, summed over many entries, is still a normal number of float32
_DEPENDENT = 50.0  # roundings of the product below which nothing of it is new


@dataclass(frozen=True)
class Eigenpairs:
    """What was found.

    Attributes:
        values: ``(k,)`` float64, descending.
        residuals: ``(k,)``, norms of A v - value v: every one bounds the distance to an eigenvalue.
        converged: ``(k,)``, whether the error by the residual and the gap is at most the tolerance times the largest
            value in size.
        vectors: ``(k, n)``, orthonormal; after them those to spare. Of a search with few rows they lie in the memory of
            all four: copy them when there is room.
        lowest: the smallest Ritz value, an upper bound of the smallest eigenvalue.
        lowest_residual: its residual.
        asymmetry: the largest ``|A - A^T|`` that was seen, over the largest entry of the projected matrix.
        n_products: how many were made.
    """

    values: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    vectors: Tensor
    lowest: float
    lowest_residual: float
    asymmetry: float
    n_products: int


class _Basis:
    """Orthonormal rows V with T = V A V^T, and the next row."""

    def __init__(self, n: int, rows: int, start: Tensor) -> None:
        self.V = torch.empty(rows + 1, n, dtype=start.dtype, device=start.device)
        self.T = np.zeros((rows, rows))
        self.coupling = np.zeros(rows)  # of every row with the next one
        self.size, self.rows, self.asymmetry = 0, rows, 0.0
        self.invariant = False
        self.V[0].copy_(start).div_(torch.linalg.vector_norm(start))

    def grow(self, product: Product) -> None:
        """Multiply the last row; the row after it is what is new of that."""
        j = self.size
        w = product(self.V[j], self.V[j + 1])
        if w.data_ptr() != self.V[j + 1].data_ptr():
            self.V[j + 1] = w
            w = self.V[j + 1]
        before = float(torch.linalg.vector_norm(w))
        if not math.isfinite(before):
            raise not_finite()
        basis = self.V[: j + 1]
        along = basis @ w
        w.addmv_(basis.T, along, alpha=-1)
        left = float(torch.linalg.vector_norm(w))
        if left <= _MUCH * before:  # what was taken away is large, and so is its rounding
            again = basis @ w
            w.addmv_(basis.T, again, alpha=-1)
            along, left = along + again, float(torch.linalg.vector_norm(w))
        column = along.double().cpu().numpy()
        old = self.T[j, :j].copy()
        expected = self.coupling[:j] if j else old
        self.asymmetry = max(self.asymmetry, float(np.abs(column[:j] - expected).max(initial=0.0)))
        self.T[: j + 1, j] = column
        self.T[j, : j + 1] = column
        self.size = j + 1
        self.invariant = left <= _DEPENDENT * torch.finfo(w.dtype).eps * before or not before
        self.coupling = np.zeros(self.rows)
        self.coupling[j] = 0.0 if self.invariant else left
        if not self.invariant:
            w.div_(left)

    def turn(self, seed: int) -> None:
        """A random direction, orthogonal to the rows, becomes the next row."""
        generator = torch.Generator().manual_seed(seed)
        row = self.V[self.size]
        row.copy_(torch.randn(len(row), generator=generator, dtype=torch.float32))
        basis = self.V[: self.size]
        for _ in range(2):
            row.addmv_(basis.T, basis @ row, alpha=-1)
        row.div_(torch.linalg.vector_norm(row))
        self.coupling = np.zeros(self.rows)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, ascending, their vectors in the basis and residuals."""
        p = self.size
        with single_threaded(p):
            values, S = np.linalg.eigh(self.T[:p, :p])
        return values, S, np.abs(self.coupling[:p] @ S)

    def restart(self, kept: np.ndarray, values: np.ndarray, S: np.ndarray) -> None:
        """Keep some Ritz vectors; the next row stays the next."""
        p, count = self.size, len(kept)
        turned = torch.from_numpy(S[:, kept].T.copy()).to(self.V)
        for part in torch.split(
            self.V[:p], _COLUMNS, dim=1
        ):  # rows may be as large as the model: no second set of them
            part[:count] = turned @ part
        self.V[count] = self.V[p]
        coupling = self.coupling[:p] @ S[:, kept]
        self.T[:] = 0
        self.T[range(count), range(count)] = values[kept]
        self.coupling = np.zeros(self.rows)
        self.coupling[:count] = coupling
        self.size = count

    def climb(self, past: list[tuple[float, float]]) -> Climb:
        """Go on from the largest Ritz vector, in the place of the first rows; the last direction is what it moved by.

        Nothing was restarted yet, so that of A V only what lies along the next row is not in T.
        """
        p = self.size
        values, S, residuals = self.ritz()
        before = np.append(np.linalg.eigh(self.T[: p - 1, : p - 1])[1][:, -1], 0.0)
        best = S[:, -1]
        moved = before - (before @ best) * best
        length = float(np.linalg.norm(moved))
        moved = moved / length if length > _TINY else S[:, -2]
        turned = np.zeros((4, p + 1))
        turned[0, :p], turned[2, :p] = best, moved
        turned[1, p] = self.coupling[p - 1] * best[-1]
        turned[3] = np.append(self.T[:p, :p] @ moved, self.coupling[p - 1] * moved[-1])
        M = torch.from_numpy(turned).to(self.V)
        for part in torch.split(self.V[: p + 1], _COLUMNS, dim=1):
            part[:4] = M @ part
        return Climb(
            self.V[:4], float(values[-1]), float(np.abs(values).max()), float(values[-2] + residuals[-2]), past
        )


class _Scaled:
    """Products over a power of two that brings the first near 1: squares of others leave the range of float32.

    Attributes:
        size: that power.
    """

    def __init__(self, product: Product) -> None:
        self._product, self.size = product, 0.0

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        w = self._product(x, out)
        if not self.size:
            low, high = torch.aminmax(w)
            largest = max(-float(low), float(high))
            usual = not 0 < largest < math.inf or _TINY < largest < 1 / _TINY
            self.size = 1.0 if usual else 2.0 ** round(math.log2(largest))
        return w if self.size == 1.0 else w.div_(self.size)


def _errors(values: np.ndarray, residuals: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How far Ritz values are from eigenvalues: the residual, or its square over the gap where that is less.

    The gap is the distance to the nearest other Ritz value, less the residual of that one (Kato and Temple; B. N.
    Parlett, The Symmetric Eigenvalue Problem, 1998, section 10.5). It is an estimate: what the basis has not seen yet
    is not in it.
    """
    own: np.ndarray = residuals[chosen]
    if len(values) < _FEWEST:
        return own
    away = np.abs(values[chosen, None] - values) - residuals
    away[range(len(chosen)), chosen] = np.inf
    gaps = away.min(axis=1)
    errors: np.ndarray = np.divide(own**2, gaps, out=own.copy(), where=gaps > own)
    return errors


def rows_for(n: int, itemsize: int) -> int:
    """How many rows of a basis of vectors of so many entries there is memory for."""
    return int(np.clip(_MEMORY // (n * itemsize), *_ROWS))


def _kept(count: int, k: int, rows: int) -> np.ndarray:
    """Which of the Ritz values, ascending, survive a restart: the lowest and the highest half."""
    high = np.arange(count)[::-1][: max(k + 1, rows // 2)]
    return np.unique(np.concatenate([[0], high]))[-(rows - 1) :]


def largest(
    product: Product,
    n: int,
    k: int,
    *,
    tol: float,
    start: Tensor,
    rows: int,
    max_products: int,
    spare: int = 0,
) -> Eigenpairs:
    """The k algebraically largest eigenvalues and their vectors.

    Args:
        product: writes A v into its second argument, or returns it.
        n: the size of the operator.
        k: how many.
        tol: the error, over the largest Ritz value in size, that counts as found.
        start: ``(n,)``, where the search begins; its dtype and device are those of the basis.
        rows: the most rows of the basis before a restart.
        max_products: where to stop.
        spare: how many further Ritz vectors come back among the vectors, where there are so many.

    Raises:
        TraceError: a product is not finite.
    """
    k = min(k, n)
    climbs = k == 1 and not spare and rows < min(_ENOUGH, n)
    rows = min(n, max(rows, _ROWS[0] if climbs else k + 3))
    basis, made, looking = _Basis(n, rows, start), 0, False
    past = []
    low = math.inf, math.inf  # a Ritz value stays a bound when a restart has let go of its vector
    del start  # as large as the model
    scaled = _Scaled(product)
    while True:
        basis.grow(scaled)
        made += 1
        values, S, residuals = basis.ritz()
        if values[0] < low[0]:
            low = float(values[0]), float(residuals[0])
        top = np.arange(len(values))[::-1][:k]
        goal = tol * float(np.abs(values).max(initial=0.0))
        found = _errors(values, residuals, top) <= goal
        past.append((float(values[-1]), float(residuals[-1])))
        if made >= max_products or basis.size == n:
            break
        settled = len(top) == k and bool(found.all())
        if settled and looking and len(values) > k:  # nothing that is left comes near those that were found
            settled = bool(values[-k - 1] + residuals[-k - 1] < values[-k] or residuals[-k - 1] <= goal)
        if settled and (looking or k == 1):
            break
        if settled or basis.invariant:
            # one start vector sees one copy of a multiple eigenvalue, and nothing outside of an invariant subspace
            looking = settled or looking
            if basis.size == rows:
                basis.restart(_kept(len(values), k, rows), values, S)
            basis.turn(seed=made)
        elif climbs and basis.size == rows:
            top_one = basis.climb(past)
            top_one.run(scaled, tol, max_products - made)
            return Eigenpairs(
                np.array([scaled.size * top_one.value]),
                np.array([scaled.size * top_one.residual]),
                np.array([top_one.converged]),
                top_one.vectors[:1],
                scaled.size * low[0],
                scaled.size * low[1],
                max(top_one.asymmetry, basis.asymmetry) / top_one.size,
                len(top_one.past),
            )
        elif basis.size == rows:
            basis.restart(_kept(len(values), k, rows), values, S)
    back = np.arange(len(values))[::-1][: k + spare]
    vectors = torch.from_numpy(S[:, back].T.copy()).to(basis.V) @ basis.V[: basis.size]
    size = float(np.abs(basis.T).max(initial=0.0)) or 1.0
    return Eigenpairs(
        scaled.size * values[top],
        scaled.size * residuals[top],
        found | (basis.size == n),
        vectors,
        scaled.size * low[0],
        scaled.size * low[1],
        basis.asymmetry / size,
        made,
    )
