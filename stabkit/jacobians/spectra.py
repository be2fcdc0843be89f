"""Eigenvalues and singular values of batches of linear operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from stabkit.jacobians.iterative import iterative_eigenvalues, iterative_singular_values
from stabkit.jacobians.krylov_schur import EDGES, Badness, order
from stabkit.jacobians.lapack import dense_eigenvalues, dense_singular_values
from stabkit.jacobians.operator import Jacobian
from stabkit.jacobians.products import as_jacobian, dense_float64, entry_rounding, rounding
from stabkit.jacobians.spectrum import Spectrum, from_rows, row, trusted_values

Operator = Jacobian | Tensor | np.ndarray

# Sizes up to which LAPACK is cheaper than iterating, and up to which it takes over when the iteration fails.
# Measured on one core in float64: eigenvalues with both eigenvectors 2 n^3 ns, SVD .7 n^3 ns.
_DENSE_EIGEN, _DENSE_EIGEN_RESCUE = 512, 2048
_DENSE_SINGULAR, _DENSE_SINGULAR_RESCUE = 512, 4096
_LARGEST_DENSE = 20_000


def eigenvalues(
    J: Operator,
    k: int | None = None,
    which: str | complex = "LM",
    *,
    tol: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    method: str = "auto",
    two_sided: bool = True,
) -> Spectrum:
    """Eigenvalues of every sample, each with its residual, condition number, error bound and flag.

    Args:
        J: a Jacobian ``(batch, n, n)``, or explicit matrices ``(n, n)`` or ``(batch, n, n)``.
        k: how many; all of them by default.
        which: ``"LM"`` largest modulus, ``"LR"`` rightmost, ``"SR"`` leftmost, or a number: nearest to it.
        tol: residual, as a fraction of the norm of J, that counts as converged. By default 1e-10, or 16 times
            the rounding unit of the products where that is larger (2e-6 in float32).
        max_products: the most products with J and J^T to spend, in vectors per sample.
        seed: of the random start blocks.
        method: ``"dense"`` (LAPACK in float64), ``"krylov-schur"``, or ``"auto"``.
        two_sided: also find left eigenvectors, for the true condition numbers (iterative method only). Without
            them (about half of the products) the condition numbers are those of the projected matrix, which can
            be too small: an ill-conditioned eigenvalue may then pass as converged.

    Returns:
        A :class:`Spectrum`; where ``"auto"`` iterates without success on a moderate size, LAPACK takes over.

    Raises:
        TypeError: entries are not real floating-point numbers.
        ValueError: J is not square, has entries that are not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> rotation = torch.tensor([[0.0, -2.0], [2.0, 0.0]])
        >>> [complex(round(v.real, 9), round(v.imag, 9)) for v in eigenvalues(rotation).values[0].tolist()]
        [2j, -2j]

    Source: G. W. Stewart, SIAM J. Matrix Anal. Appl. 23 (2002) 601 (iterative); LAPACK geev (dense).
    """
    J = as_jacobian(J)
    _, m, n = J.shape
    if m != n:
        raise ValueError(
            f"J has shape {J.shape}: eigenvalues need a square operator; use singular_values(J) for a rectangular one"
        )
    k = _count(k, n)
    badness = _badness(which)
    tol = _tolerance(tol, J)
    _check_budget(max_products)
    plan = _plan(method, "krylov-schur", k, n, n, max_products, _DENSE_EIGEN)
    used = 0
    if plan == "krylov-schur":
        rescue = method == "auto" and n <= _DENSE_EIGEN_RESCUE
        limit = max_products
        if rescue:
            limit = n if max_products is None else min(n, max_products)
        spectrum = iterative_eigenvalues(J, k, badness, str(which), tol, limit, seed, two_sided)
        used = spectrum.n_products
        affordable = max_products is None or max_products - used >= n
        if bool(spectrum.converged.all()) or not rescue or not affordable or spectrum.stopped == "interrupted":
            return spectrum
    return _dense_eigenvalues(J, k, badness, str(which), tol, used)


def singular_values(
    J: Operator,
    k: int | None = None,
    which: str = "LM",
    *,
    tol: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    method: str = "auto",
) -> Spectrum:
    """Singular values of every sample, each with its residual, error bound and flag.

    Args:
        J: a Jacobian ``(batch, m, n)``, or explicit matrices ``(m, n)`` or ``(batch, m, n)``.
        k: how many; all ``min(m, n)`` by default.
        which: ``"LM"`` the largest, descending; ``"SM"`` the smallest, ascending.
        tol: residual, as a fraction of the norm of J, that counts as converged. By default 1e-10, or 16 times
            the rounding unit of the products where that is larger (2e-6 in float32).
        max_products: the most products with J and J^T to spend, in vectors per sample.
        seed: of the random start blocks.
        method: ``"dense"`` (LAPACK in float64), ``"golub-kahan"``, or ``"auto"``.

    Returns:
        A :class:`Spectrum`. J^T J is never formed, so small values are as good as the products: absolute
        errors of about the rounding unit times the largest singular value.

    Raises:
        TypeError: entries are not real floating-point numbers.
        ValueError: entries are not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).values.tolist()
        [[4.0, 3.0]]

    Source: J. Baglama, L. Reichel, SIAM J. Sci. Comput. 27 (2005) 19 (iterative); LAPACK gesdd (dense).
    """
    J = as_jacobian(J)
    _, m, n = J.shape
    k = _count(k, min(m, n))
    if which not in ("LM", "SM"):
        raise ValueError(f"which={which!r}; singular values are 'LM' (largest) or 'SM' (smallest)")
    tol = _tolerance(tol, J)
    _check_budget(max_products)
    small = _DENSE_SINGULAR if which == "LM" else _DENSE_SINGULAR_RESCUE
    plan = _plan(method, "golub-kahan", k, m, n, max_products, small)
    used = 0
    if plan == "golub-kahan":
        rescue = method == "auto" and min(m, n) <= _DENSE_SINGULAR_RESCUE
        limit = max_products
        if rescue:
            limit = min(m, n) if max_products is None else min(m, n, max_products)
        spectrum = iterative_singular_values(J, k, which, tol, limit, seed)
        used = spectrum.n_products
        affordable = max_products is None or max_products - used >= min(m, n)
        if bool(spectrum.converged.all()) or not rescue or not affordable or spectrum.stopped == "interrupted":
            return spectrum
    return _dense_singular_values(J, k, which, tol, used)


def _count(k: Any, largest: int) -> int:
    if k is None:
        return largest
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise TypeError(f"k is a {type(k).__name__}; expected an integer from 1 to {largest}, or None for all")
    if not 1 <= k <= largest:
        raise ValueError(f"k={k}, but J has {largest} of them; expected 1 <= k <= {largest}, or None for all")
    return int(k)


def _badness(which: Any) -> Badness:
    if isinstance(which, str):
        if which not in EDGES:
            near = "; for the smallest modulus give the point 0" if which == "SM" else ""
            raise ValueError(
                f"which={which!r}; expected 'LM', 'LR' (rightmost), 'SR' (leftmost) or a number (nearest to it){near}"
            )
        return EDGES[which]
    if isinstance(which, bool) or not isinstance(which, int | float | complex | np.number) or not np.isfinite(which):
        raise ValueError(f"which={which!r}; expected 'LM', 'LR', 'SR' or a finite number")
    target = complex(which)
    return lambda z: np.abs(z - target)


def _tolerance(tol: float | None, J: Jacobian) -> float:
    if tol is None:
        return max(1e-10, 16 * rounding(J))
    if not 0 < tol < 1:
        raise ValueError(f"tol={tol}; expected a fraction of the norm of J between 0 and 1, such as 1e-6")
    return float(tol)


def _check_budget(max_products: int | None) -> None:
    if max_products is not None and max_products < 1:
        raise ValueError(f"max_products={max_products}; expected at least 1, or None")


def _plan(method: str, iterative: str, k: int, m: int, n: int, max_products: int | None, small: int) -> str:
    """``"dense"`` or the name of the iteration."""
    if method not in ("auto", "dense", iterative):
        raise ValueError(f"method={method!r}; expected 'auto', 'dense' or {iterative!r}")
    if method == iterative:
        return method
    size = min(m, n)
    affordable = max_products is None or max_products >= size
    if method == "dense" and not affordable:
        raise ValueError(
            f"max_products={max_products}, but method='dense' needs {size} products: raise it, or use {iterative!r}"
        )
    wants_dense = method == "dense" or size <= small or 6 * k >= size
    if wants_dense and size > _LARGEST_DENSE:
        raise ValueError(
            f"J has shape ({m}, {n}): a dense decomposition for k={k} is out of reach; ask for k below {size // 6}"
        )
    return "dense" if wants_dense and affordable else iterative


def _dense_eigenvalues(J: Jacobian, k: int, badness: Badness, which: str, tol: float, used: int) -> Spectrum:
    rows = []
    for A in dense_float64(J).numpy():
        found = dense_eigenvalues(A, entry_rounding(J))
        best = order(found.values, badness)[:k]
        values, residuals, bounds, conditions = (
            column[best] for column in (found.values, found.residuals, found.error_bounds, found.condition_numbers)
        )
        relative = np.maximum(residuals / (found.norm or 1.0), entry_rounding(J))
        trusted = trusted_values(residuals, bounds, conditions, relative, tol, found.norm)
        rows.append(row(values, residuals, bounds, conditions, trusted))
    return from_rows(rows, k, "eigenvalues", which, "dense", used + J.shape[2], "done")


def _dense_singular_values(J: Jacobian, k: int, which: str, tol: float, used: int) -> Spectrum:
    rows = []
    for A in dense_float64(J).numpy():
        values, residuals, bounds = dense_singular_values(A, entry_rounding(J))
        best = np.arange(k) if which == "LM" else np.arange(len(values))[::-1][:k]
        converged = residuals[best] <= tol * values[0]
        rows.append(row(values[best], residuals[best], bounds[best], np.ones(k), converged))
    return from_rows(rows, k, "singular values", which, "dense", used + min(J.shape[1:]), "done")
