"""The logarithm of a real matrix, whose eigenvalues lie to the right of the imaginary axis."""

from __future__ import annotations

from typing import Any

import numpy as np

Matrix = np.ndarray[Any, np.dtype[Any]]

_NEAR, _ROOTS, _ROUNDS, _TERMS = 0.1, 12, 20, 14


def logarithm(M: Matrix) -> Matrix:
    """The principal logarithm: square roots until little is left, and the series of it (Higham 2008, chapter 11)."""
    one, roots = np.eye(len(M)), 0
    while np.abs(M - one).max() > _NEAR and roots < _ROOTS:
        M, inverse = M, one
        for _ in range(_ROUNDS):  # Denman and Beavers: to the root of M, and of its inverse
            M, inverse = (M + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(M)) / 2
        roots += 1
    Z = np.linalg.solve((M + one).T, (M - one).T).T
    series = sum((np.linalg.matrix_power(Z, k) / k for k in range(1, _TERMS, 2)), 0 * one)
    return np.asarray(2 ** (roots + 1) * series)
