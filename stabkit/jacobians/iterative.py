"""Iterative spectra: a Krylov search, then true residuals and condition numbers from further products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from stabkit.jacobians.counted_products import CountedProducts, default_tolerance, rounding
from stabkit.jacobians.golub_kahan import Triples, golub_kahan
from stabkit.jacobians.krylov_schur import EDGES, Badness, Pairs, krylov_schur
from stabkit.jacobians.spectrum import SIMPLE, Spectrum, from_rows, leading, row, trusted_values
from stabkit.operators.jacobian import Jacobian

_Checked = TypeVar("_Checked")

_MARGIN = 0.8  # of the tolerance is what the search aims at: rounding in the products comes on top
_BASIS_BYTES = 2**30
_FULL_BASES = 20  # products spent by default, as multiples of the preferred size of a basis


def iterative_singular_values(J: Jacobian, k: int, which: str, tol: float, limit: int | None, seed: int) -> Spectrum:
    """``k`` extremal singular values by Golub-Kahan, at most ``limit`` products; see ``singular_values``."""
    wide = J.shape[1] < J.shape[2]
    operator = J.T if wide else J  # the smaller side carries the basis that can become complete
    batch, m, n = operator.shape
    size = _basis_size(k, batch, m, n, max(4 * k + 100, 300))
    total = _FULL_BASES * max(3 * k + 30, 120) if limit is None else limit
    products = CountedProducts(operator, total - 2 * k, units="own")
    goal, finest = _MARGIN * tol, _MARGIN * min(tol, default_tolerance(J))
    found, stopped = golub_kahan(products, k, smallest=which == "SM", tol=goal, finest=finest, seed=seed, size=size)
    products.max_products = total
    right = _stack([t.right for t in found], products.device)
    left = _stack([t.left for t in found], products.device)
    (JV, JTU), interrupted = _despite_interrupt(lambda: (products.forward(right), products.adjoint(left)))
    rows = []
    for s, triple in enumerate(found):
        rows.append(_singular_row(triple, JV[s], JTU[s], which, tol, rounding(J), products.unit(s)))
    stopped = "interrupted" if interrupted else stopped
    return from_rows(rows, k, "singular values", which, "golub-kahan", products.count, stopped)


def _despite_interrupt(check: Callable[[], _Checked]) -> tuple[_Checked, bool]:
    """The result of ``check``, and whether it was interrupted: a first interrupt must not lose what was found."""
    try:
        return check(), False
    except KeyboardInterrupt:
        return check(), True


def _singular_row(
    triple: Triples, JV: Tensor, JTU: Tensor, which: str, tol: float, eps: float, unit: float
) -> dict[str, np.ndarray]:
    count = len(triple.values)
    values = torch.from_numpy(triple.values.copy()).to(JV)[:, None]
    forward = torch.linalg.vector_norm(JV[:count] - values * triple.left, dim=1)
    adjoint = torch.linalg.vector_norm(JTU[:count] - values * triple.right, dim=1)
    residuals = torch.sqrt((forward**2 + adjoint**2) / 2).cpu().numpy()
    converged = leading(residuals <= tol * triple.norm, triple.settled, extremal=which == "LM")
    resolution = eps if which == "LM" else 20 * eps  # how finely the search tells the smallest values apart
    return row(triple.values, residuals, residuals + resolution * triple.norm, np.ones(count), converged, unit)


def iterative_eigenvalues(
    J: Jacobian,
    k: int,
    badness: Badness,
    which: str,
    tol: float,
    limit: int | None,
    seed: int,
    two_sided: bool,
) -> Spectrum:
    """``k`` most wanted eigenvalues by Krylov-Schur, at most ``limit`` products; see ``eigenvalues``."""
    batch, _, n = J.shape
    size = _basis_size(k, batch, 0, n, max(4 * k + 100, 300))
    total = _FULL_BASES * max(2 * k + 60, 120) if limit is None else limit
    products = CountedProducts(J, total - 2 * k, units="own")
    found, stopped = krylov_schur(products, k, badness=badness, tol=_MARGIN * tol, seed=seed, size=size)
    products.max_products = total
    residuals, interrupted = _despite_interrupt(lambda: _eigen_residuals(products, found, transposed=False))
    stopped = "interrupted" if interrupted else stopped
    conditions = [pairs.conditions for pairs in found]
    if two_sided and stopped != "interrupted":
        conditions, left_stopped = _condition_numbers(products, found, badness, k, tol, seed, size)
        stopped = left_stopped if stopped == "done" else stopped
    rows = [
        _eigen_row(pairs, r, c, tol, rounding(J), which in EDGES, products.unit(s))
        for s, (pairs, r, c) in enumerate(zip(found, residuals, conditions, strict=True))
    ]
    return from_rows(rows, k, "eigenvalues", which, "krylov-schur", products.count, stopped)


def _eigen_row(
    pairs: Pairs,
    residuals: np.ndarray,
    conditions: np.ndarray,
    tol: float,
    eps: float,
    extremal: bool,
    unit: float,
) -> dict[str, np.ndarray]:
    relative = np.maximum(residuals / (pairs.norm or 1.0), eps)
    with np.errstate(over="ignore", invalid="ignore"):
        bounds = np.where(conditions**2 * relative <= SIMPLE, conditions * (residuals + eps * pairs.norm), np.inf)
    trusted = trusted_values(residuals, bounds, conditions, relative, tol, pairs.norm)
    converged = leading(trusted, pairs.settled, extremal=extremal)
    return row(pairs.values, residuals, bounds, conditions, converged, unit)


def _eigen_residuals(products: CountedProducts, found: Sequence[Pairs], *, transposed: bool) -> list[np.ndarray]:
    """||J x - theta x|| of every pair; ``transposed``: of J^T and conj(x), zero where J is normal."""
    stacked = [_real_rows(pairs) for pairs in found]
    rows = _stack([r for r, _ in stacked], products.device)
    W = products.adjoint(rows) if transposed else products.forward(rows)
    out = []
    for s, (pairs, (_, places)) in enumerate(zip(found, stacked, strict=True)):
        norms = np.zeros(len(places))
        for i, (at, sign) in enumerate(places):
            x = pairs.vectors[i]
            image = torch.complex(W[s, at], sign * W[s, at + 1] if sign else torch.zeros_like(W[s, at]))
            if transposed:
                x, image = x.conj(), image.conj()
            norms[i] = float(torch.linalg.vector_norm(image - complex(pairs.values[i]) * x))
        out.append(norms)
    return out


def _real_rows(pairs: Pairs) -> tuple[Tensor, list[tuple[int, int]]]:
    """Real and imaginary parts to be multiplied, and for each pair where its rows start and their sign."""
    rows: list[Tensor] = []
    places: list[tuple[int, int]] = []
    for i, value in enumerate(pairs.values):
        if value.imag == 0:
            places.append((len(rows), 0))
            rows.append(pairs.vectors[i].real)
        elif i and pairs.values[i - 1] == np.conj(value):
            places.append((places[-1][0], -1))  # numpy returns conjugate vectors for a conjugate pair
        else:
            places.append((len(rows), 1))
            rows += [pairs.vectors[i].real, pairs.vectors[i].imag]
    return (torch.stack(rows) if rows else pairs.vectors.real), places


def _condition_numbers(
    products: CountedProducts, found: list[Pairs], badness: Badness, k: int, tol: float, seed: int, size: int
) -> tuple[list[np.ndarray], str]:
    """1 / |y^H x| from left eigenvectors: the right ones where J is normal, else from a search on J^T.

    Returns:
        The condition numbers of each sample, ``inf`` where no left eigenvector was found, and why the search ended.
    """
    rows = 2 * max(len(pairs.values) for pairs in found)
    if products.remaining() < rows or not rows:
        return [np.full(len(pairs.values), np.inf) for pairs in found], "budget"
    normal, interrupted = _despite_interrupt(lambda: _eigen_residuals(products, found, transposed=True))
    if all((r <= tol * p.norm).all() for r, p in zip(normal, found, strict=True)):
        conditions = [_duality(pairs.vectors.conj(), pairs.vectors) for pairs in found]
        return conditions, "interrupted" if interrupted else "done"
    if interrupted:
        return [pairs.conditions for pairs in found], "interrupted"
    transposed = products.transposed()
    wanted = min(k + 2, products.J.shape[2])
    left, stopped = krylov_schur(
        transposed,
        wanted,
        badness=badness,
        tol=_MARGIN * tol,
        seed=seed + 1,
        size=size,
        look=any(_has_copies(pairs, 100 * tol) for pairs in found),
    )
    products.count += transposed.count
    out = []
    for pairs, other in zip(found, left, strict=True):
        good = torch.from_numpy(other.residuals <= 10 * tol * other.norm)
        out.append(_duality(other.vectors[good.to(other.vectors.device)], pairs.vectors))
    return out, stopped


def _has_copies(pairs: Pairs, tol: float) -> bool:
    """Whether two values agree within ``tol``: all copies then need a left vector too."""
    distances = np.abs(pairs.values[:, None] - pairs.values[None, :])
    np.fill_diagonal(distances, np.inf)
    return bool(distances.min(initial=np.inf) <= tol * pairs.norm)


def _duality(left: Tensor, right: Tensor) -> np.ndarray:
    """Norms of the rows d_i in the span of ``left`` with d_i x_j = delta_ij; inf where there is none."""
    overlap = (left @ right.T).cpu().numpy()
    if not len(overlap):
        return np.full(len(right), np.inf)
    dual = np.linalg.pinv(overlap, rcond=1e-15)
    miss = np.abs(dual @ overlap - np.eye(len(right))).max(1)
    gram = (left @ left.conj().T).cpu().numpy()
    norms = np.sqrt(np.abs(np.einsum("ij,jk,ik->i", dual, gram, dual.conj())))
    return np.where(miss < 1e-6, np.maximum(norms, 1.0), np.inf)


def _basis_size(k: int, batch: int, m: int, n: int, preferred: int) -> int:
    """Vectors in the Krylov basis: as preferred, fewer where memory would not hold them, never below 2 k + 20."""
    fitting = _BASIS_BYTES // (8 * batch * (m + n))
    return max(2 * k + 20, min(preferred, fitting))


def _stack(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Samples with different numbers of rows, padded with zeros."""
    out = torch.zeros(len(rows), max(len(r) for r in rows), rows[0].shape[1], dtype=torch.float64, device=device)
    for s, r in enumerate(rows):
        out[s, : len(r)] = r
    return out
