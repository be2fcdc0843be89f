"""Spectra of whole matrices: every sample is made dense from products and handed to LAPACK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stabkit.jacobians.counted_products import dense_float64, entry_rounding, powers_of_two
from stabkit.jacobians.krylov_schur import Badness, order
from stabkit.jacobians.lapack import (
    dense_eigenvalues,
    dense_singular_values,
    gram_error,
    gram_singular_values,
    only_singular_values,
)
from stabkit.jacobians.spectrum import Spectrum, from_rows, row, trusted_values
from stabkit.operators.jacobian import Jacobian
from stabkit.threads import single_threaded

Row = dict[str, np.ndarray]

# Singular vectors, and with them true residuals, up to this size always, and beyond it for less than this part of
# the values: n = 2048 takes 4.2 s with vectors, 2.5 s without, .75 s by the Gram matrix.
_WITH_VECTORS, _VECTORS_PART = 512, 4


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
