"""Eigenvalues and singular values of batches of linear operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.jacobians.counted_products import (
    as_jacobian,
    default_tolerance,
    dense_float64,
    entry_rounding,
    powers_of_two,
)
from stabkit.jacobians.iterative import iterative_eigenvalues, iterative_singular_values
from stabkit.jacobians.krylov_schur import EDGES, Badness, order
from stabkit.jacobians.lapack import (
    dense_eigenvalues,
    dense_singular_values,
    gram_error,
    gram_singular_values,
    only_singular_values,
)
from stabkit.jacobians.method_choice import MethodChoice, choose_method
from stabkit.jacobians.spectrum import Spectrum, from_rows, row, trusted_values
from stabkit.operators.jacobian import Jacobian
from stabkit.threads import single_threaded

Operator = Jacobian | Tensor | np.ndarray
Row = dict[str, np.ndarray]

# Singular vectors, and with them true residuals, up to this size always, and beyond it for less than this part of
# the values: n = 2048 takes 4.2 s with vectors, 2.5 s without, .75 s by the Gram matrix.
_WITH_VECTORS, _VECTORS_PART = 512, 4


@accepts
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
        seed: the seed of the random start blocks.
        method: ``"dense"`` (LAPACK in float64), ``"krylov-schur"``, or ``"auto"``.
        two_sided: also find left eigenvectors, for the true condition numbers (iterative method only). Without
            them (about half of the products) the condition numbers are those of the projected matrix, which can
            be too small: an ill-conditioned eigenvalue may then pass as converged.

    Returns:
        A :class:`Spectrum`; where ``"auto"`` iterates without success on a moderate size, LAPACK takes over.

    Raises:
        ArgumentTypeError: entries are not real floating-point numbers.
        ArgumentError: J is not square, has entries that are not finite, or an argument is out of range.

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
        raise ArgumentError(
            f"J has shape {J.shape}: eigenvalues need a square operator; use singular_values(J) for a rectangular one"
        )
    k = _count(k, n)
    badness = _badness(which)
    tol = _tolerance(tol, J)
    chosen = choose_method("eigenvalues", "krylov-schur", k, J.shape, str(which), method, max_products)
    used, reason = 0, chosen.reason
    if chosen.method != "dense":
        spectrum = iterative_eigenvalues(J, k, badness, str(which), tol, chosen.limit, seed, two_sided)
        if not _rescued(chosen, spectrum, n, max_products):
            return replace(spectrum, reason=reason, path=J.path)
        used, reason = spectrum.n_products, _rescue_reason(spectrum)
    return replace(whole_eigenvalues(J, k, badness, str(which), tol, used), reason=reason)


@accepts
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
        seed: the seed of the random start blocks.
        method: ``"dense"`` (LAPACK in float64), ``"golub-kahan"``, or ``"auto"``.

    Returns:
        A :class:`Spectrum`, with absolute errors of about the rounding unit of the products times the largest value.
        The iteration and ``which="SM"`` never go through J^T J. For most or all values at once of more than 512, with
        a tolerance that allows it (the default in float32), eigenvalues of the Gram matrix in float64 are the cheaper
        way, and ``method`` says ``"dense gram"``.

    Raises:
        ArgumentTypeError: entries are not real floating-point numbers.
        ArgumentError: entries are not finite, or an argument is out of range.

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
        raise ArgumentError(f"which={which!r}; singular values are 'LM' (largest) or 'SM' (smallest)")
    tol = _tolerance(tol, J)
    chosen = choose_method("singular values", "golub-kahan", k, J.shape, which, method, max_products)
    used, reason = 0, chosen.reason
    if chosen.method != "dense":
        spectrum = iterative_singular_values(J, k, which, tol, chosen.limit, seed)
        if not _rescued(chosen, spectrum, min(m, n), max_products):
            return replace(spectrum, reason=reason, path=J.path)
        used, reason = spectrum.n_products, _rescue_reason(spectrum)
    return replace(whole_singular_values(J, k, which, tol, used), reason=reason)


def _rescued(chosen: MethodChoice, spectrum: Spectrum, size: int, max_products: int | None) -> bool:
    """Whether LAPACK takes over from an iteration that has failed."""
    if bool(spectrum.converged.all()) or not chosen.rescue or spectrum.stopped == "interrupted":
        return False
    return max_products is None or max_products - spectrum.n_products >= size


def _rescue_reason(spectrum: Spectrum) -> str:
    missing = int((~spectrum.converged).sum())
    return f"{missing} values had not converged after {spectrum.n_products} products of {spectrum.method}"


def _count(k: Any, largest: int) -> int:
    if k is None:
        return largest
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise ArgumentTypeError(f"k is a {type(k).__name__}; expected an integer from 1 to {largest}, or None for all")
    if not 1 <= k <= largest:
        raise ArgumentError(f"k={k}, but J has {largest} of them; expected 1 <= k <= {largest}, or None for all")
    return int(k)


def _badness(which: Any) -> Badness:
    if isinstance(which, str):
        if which not in EDGES:
            near = "; for the smallest modulus give the point 0" if which == "SM" else ""
            raise ArgumentError(
                f"which={which!r}; expected 'LM', 'LR' (rightmost), 'SR' (leftmost) or a number (nearest to it){near}"
            )
        return EDGES[which]
    if isinstance(which, bool) or not isinstance(which, int | float | complex | np.number) or not np.isfinite(which):
        raise ArgumentError(f"which={which!r}; expected 'LM', 'LR', 'SR' or a finite number")
    target = complex(which)
    return lambda z: np.abs(z - target)


def _tolerance(tol: float | None, J: Jacobian) -> float:
    if tol is None:
        return default_tolerance(J)
    if not 0 < tol < 1:
        raise ArgumentError(f"tol={tol}; expected a fraction of the norm of J between 0 and 1, such as 1e-6")
    return float(tol)


def whole_eigenvalues(J: Jacobian, k: int, badness: Badness, which: str, tol: float, used: int) -> Spectrum:
    """The ``k`` most wanted of all eigenvalues; ``used`` products were spent before."""
    rounding = entry_rounding(J)

    def decompose(A: np.ndarray, unit: float) -> Row:
        found = dense_eigenvalues(A, rounding)
        best = order(found.values, lambda values: badness(values * unit) / unit)[:k]
        values, residuals, bounds, conditions = (
            column[best] for column in (found.values, found.residuals, found.error_bounds, found.condition_numbers)
        )
        relative = np.maximum(residuals / (found.norm or 1.0), rounding)
        trusted = trusted_values(residuals, bounds, conditions, relative, tol, found.norm)
        return row(values, residuals, bounds, conditions, trusted, unit)

    rows, path, stopped = _each_sample(J, decompose)
    return replace(from_rows(rows, k, "eigenvalues", which, "dense", used + J.shape[2], stopped), path=path)


def whole_singular_values(J: Jacobian, k: int, which: str, tol: float, used: int) -> Spectrum:
    """The ``k`` largest or smallest of all singular values; ``used`` products were spent before.

    The Gram matrix, in float64, is the cheapest way to all values at once. It is used only where its error at zero is
    below the tolerance, as with products in float32, and never where the smallest ones are asked for.
    """
    rounding, size = entry_rounding(J), min(J.shape[1:])
    bounds_only = size > _WITH_VECTORS and _VECTORS_PART * k >= size
    method = "dense"
    decomposition: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]] = dense_singular_values
    if bounds_only and which == "LM" and gram_error(max(J.shape[1:])) <= tol:
        method, decomposition = "dense gram", gram_singular_values
    elif bounds_only:
        decomposition = only_singular_values

    def decompose(A: np.ndarray, unit: float) -> Row:
        values, residuals, bounds = decomposition(A, rounding)
        best = np.arange(k) if which == "LM" else np.arange(len(values))[::-1][:k]
        converged = residuals[best] <= tol * values[0]
        return row(values[best], residuals[best], bounds[best], np.ones(k), converged, unit)

    rows, path, stopped = _each_sample(J, decompose)
    return replace(from_rows(rows, k, "singular values", which, method, used + size, stopped), path=path)


def _each_sample(J: Jacobian, decompose: Callable[[np.ndarray, float], Row]) -> tuple[list[Row], str, str]:
    """The rows of every sample, from its matrix over a unit and that unit; empty ones from where an interrupt came.

    Also how the matrices were found, and how the work ended.
    """
    nothing = np.zeros(0)
    rows: list[Row] = []
    path, stopped = J.path, "done"
    try:
        dense, path = dense_float64(J)
        units = powers_of_two(dense)
        if bool((units != 1).any()):
            dense = dense / units.reshape(-1, 1, 1)
        with single_threaded(max(dense.shape[1:])):
            rows.extend(map(decompose, dense.numpy(), units.tolist()))  # keeps the finished ones
    except KeyboardInterrupt:
        stopped = "interrupted"
    empty = row(nothing, nothing, nothing, nothing, nothing.astype(bool))
    return rows + [empty] * (J.shape[0] - len(rows)), path, stopped
