"""Dense eigenvalues and singular values in float64, with error bounds that hold for defective matrices too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_EPS = float(np.finfo(np.float64).eps)


@dataclass
class DenseEigenvalues:
    """All eigenvalues of one matrix, ``(n,)`` each: values, residuals, error bounds, condition numbers."""

    values: np.ndarray
    residuals: np.ndarray
    error_bounds: np.ndarray
    condition_numbers: np.ndarray
    norm: float


def dense_eigenvalues(A: np.ndarray, rounding: float) -> DenseEigenvalues:
    """All eigenvalues of a real matrix ``(n, n)``, exactly those of its irreducible diagonal blocks.

    The zeros of a Jacobian are structural (causality, masks, locality). The strongly connected components of
    its pattern order it into block triangular form, whose eigenvalues are those of the diagonal blocks: a
    nilpotent or unit triangular step keeps exact eigenvalues, where LAPACK on the whole matrix may be off by
    ``eps ** (1 / n)``.

    Each block's error bound is a union of Gershgorin discs in its eigenvector basis (Wilkinson; Demmel, Applied
    Numerical Linear Algebra, theorem 4.5): disc i has radius ``n kappa_i eps ||A||``, and the eigenvalues of
    overlapping discs can only be told apart as a group.

    Args:
        A: the matrix.
        rounding: relative error of its entries, as a fraction of the norm.
    """
    import scipy.linalg

    n = len(A)
    norm = float(scipy.linalg.svdvals(A)[0])
    values = np.zeros(n, dtype=complex)
    residuals, bounds, conditions = np.zeros(n), np.full(n, rounding * norm), np.ones(n)
    for rows in _irreducible_blocks(A):
        if len(rows) == 1:
            values[rows] = A[rows, rows]
            continue
        block = A[np.ix_(rows, rows)]
        values[rows], residuals[rows], conditions[rows] = _block_eigenvalues(block)
        error = 2 * _EPS * float(np.linalg.norm(block)) + float(residuals[rows].max())
        bounds[rows] = _disc_groups(values[rows], conditions[rows] * (len(rows) * error + rounding * norm), norm)
    return DenseEigenvalues(values, residuals, bounds, conditions, norm)


def _irreducible_blocks(A: np.ndarray) -> list[np.ndarray]:
    import scipy.sparse
    from scipy.sparse.csgraph import connected_components

    pattern = scipy.sparse.csr_array(A != 0)
    count, labels = connected_components(pattern, directed=True, connection="strong")
    by_label = np.argsort(labels, kind="stable")
    return np.split(by_label, np.searchsorted(labels[by_label], np.arange(1, count)))


def _block_eigenvalues(A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, residuals and condition numbers ``1 / |y^H x|``."""
    import scipy.linalg

    if np.array_equal(A, A.T):
        real_values, X = np.linalg.eigh(A)
        return real_values.astype(complex), np.linalg.norm(A @ X - X * real_values, axis=0), np.ones(len(A))
    values, Y, X = scipy.linalg.eig(A, left=True, right=True)
    overlap = np.abs((Y.conj() * X).sum(0))
    with np.errstate(divide="ignore"):
        conditions = 1 / overlap
    return values, np.linalg.norm(A @ X - X * values, axis=0), conditions


def plain_eigenvalues(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, and condition numbers with respect to any perturbation of A (``inf`` where defective)."""
    values, _, conditions = _block_eigenvalues(A)
    return values, conditions


def _disc_groups(values: np.ndarray, radii: np.ndarray, norm: float) -> np.ndarray:
    """For each value, the farthest point of the connected group of discs that it belongs to."""
    from scipy.sparse.csgraph import connected_components

    distances = np.abs(values[:, None] - values[None, :])
    _, labels = connected_components(distances <= radii[:, None] + radii[None, :], directed=False)
    bounds = radii.copy()
    for label in np.flatnonzero(np.bincount(labels) > 1):
        group = labels == label
        bounds[group] = (distances[np.ix_(group, group)] + radii[None, group]).max(1)
    limited: np.ndarray = np.minimum(bounds, np.abs(values) + norm)  # no eigenvalue lies beyond the norm
    return limited


def dense_singular_values(A: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values (descending), residuals and error bounds of one matrix ``(m, n)``.

    LAPACK's values are exact for a matrix within a few eps ||A||_2 of A (Weyl), and ``rounding * ||A||_2`` is
    added for the entries themselves.
    """
    import scipy.linalg

    U, values, Vt = scipy.linalg.svd(A, full_matrices=False, check_finite=False)
    forward = np.linalg.norm(A @ Vt.T - U * values, axis=0)
    adjoint = np.linalg.norm(A.T @ U - Vt.T * values, axis=0)
    residuals = np.sqrt((forward**2 + adjoint**2) / 2)
    return values, residuals, residuals + (rounding + 4 * _EPS) * values[0]


def only_singular_values(A: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Like :func:`dense_singular_values` without vectors: LAPACK's backward error stands for the residuals."""
    import scipy.linalg

    values = scipy.linalg.svdvals(A, check_finite=False)
    errors = np.full(len(values), _backward_error(max(A.shape)) * values[0])
    return values, errors, errors + rounding * values[0]


def gram_singular_values(A: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same from the eigenvalues of A^T A or A A^T, in a third of the time.

    An eigenvalue off by d moves its root sigma by ``d / (2 sigma)``, and by ``sqrt(d)`` near zero: the residuals are
    these bounds. Small values keep no relative accuracy.
    """
    import scipy.linalg

    small = A if A.shape[0] >= A.shape[1] else A.T
    squares = scipy.linalg.eigvalsh(small.T @ small, check_finite=False, overwrite_a=True)[::-1]
    values = np.sqrt(np.maximum(squares, 0.0))
    error = _backward_error(max(A.shape)) * max(float(squares[0]), 0.0)
    errors = error / np.maximum(values, np.sqrt(error) or 1.0)
    return values, errors, errors + rounding * values[0]


def gram_error(n: int) -> float:
    """The most by which :func:`gram_singular_values` may miss a value, as a fraction of the largest."""
    return float(np.sqrt(_backward_error(n)))


def _backward_error(n: int) -> float:
    """Of LAPACK's symmetric and singular value decompositions and of an n x n product, in units of the norm.

    The proven bounds grow with n; errors of independent sign grow with its root, which is what is seen.
    """
    return 4 * _EPS * float(np.sqrt(n))
