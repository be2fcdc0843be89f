"""Spectral radii of many small matrices, and whether their powers stay bounded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ComplexArray = npt.NDArray[np.complex128]
FloatArray = npt.NDArray[np.float64]

_CHUNK = 2048  # points at a time: the working set of the simultaneous iteration then stays in cache
_COARSE = 48  # nodes per side of the grid whose roots start the iteration
_ITERATIONS = 14
_LEFT_OVER = 4  # so few unsettled points of a chunk cost less by the companion matrix than by one more iteration
_CLEAR = 1e-8  # margin of the Schur-Cohn reduction below which rounding could decide
# Eigenvalues closer than this are one cluster: a double root moves by about the square root of rounding.
_CLUSTER = 1e-7


def spectral_radius(M: ComplexArray) -> FloatArray:
    """The largest modulus of an eigenvalue.

    Args:
        M: ``(..., r, r)``; a matrix with a non-finite entry has spectral radius ``inf``.

    Returns:
        ``(...)``.

    Example:
        >>> float(spectral_radius(np.array([[0, 1j], [1j, 0]])))
        1.0
    """
    r = M.shape[-1]
    if r == 1:
        radius = np.abs(M[..., 0, 0])
    else:
        finite = np.asarray(np.isfinite(M).all(axis=(-2, -1)))
        values = eigenvalues(np.where(finite[..., None, None], M, 0))
        radius = np.where(finite, np.abs(values).max(axis=-1), np.inf)
    return np.where(np.isnan(radius), np.inf, radius)


def eigenvalues(M: ComplexArray) -> ComplexArray:
    """The eigenvalues ``(..., r)`` of matrices ``(..., r, r)``; two by two in closed form."""
    if M.shape[-1] != 2:
        return np.asarray(np.linalg.eigvals(M), dtype=complex)
    a, b, c, d = M[..., 0, 0], M[..., 0, 1], M[..., 1, 0], M[..., 1, 1]
    mean, half = (a + d) / 2, (a - d) / 2
    root = np.sqrt(half * half + b * c)
    return np.stack([mean + root, mean - root], axis=-1)


def has_defective_unit_eigenvalue(M: ComplexArray, tolerance: float) -> npt.NDArray[np.bool_]:
    """Whether a repeated eigenvalue on the unit circle lacks eigenvectors, so that powers grow.

    Args:
        M: ``(n, r, r)``, finite, with spectral radius at most about 1.
        tolerance: how far from modulus 1 an eigenvalue still counts as on the circle.
    """
    values = np.linalg.eigvals(M)
    out = np.zeros(len(M), dtype=bool)
    if M.shape[-1] == 1:
        return out
    unit = np.abs(np.abs(values) - 1) <= max(tolerance, _CLUSTER)
    near = np.abs(values[:, :, None] - values[:, None, :]) <= _CLUSTER
    sizes = (near & unit[:, None, :] & unit[:, :, None]).sum(axis=-1)
    for n, k in np.argwhere(sizes > 1):
        shifted = M[n] - values[n, k] * np.eye(M.shape[-1])
        small = np.linalg.svd(shifted, compute_uv=False) <= 10 * _CLUSTER * max(1.0, np.abs(M[n]).max())
        out[n] |= bool(small.sum() < sizes[n, k])
    return out


def root_radius(coefficients: FloatArray, z: ComplexArray) -> FloatArray:
    """The largest modulus of a root zeta of sum_kj c_kj zeta^k z^j, at many z.

    Weierstrass' simultaneous iteration, started from the roots on a coarse grid over the given points; the points
    where it does not settle (roots nearly repeated) are left to the companion matrix. About ten times faster than
    an eigenvalue call for each point.

    Args:
        coefficients: ``(r + 1, K + 1)``.
        z: ``(n,)``, finite.

    Returns:
        ``(n,)``; ``inf`` at a pole.
    """
    nodes, roots, slopes, index = _coarse_roots(coefficients, z)
    out = np.empty(len(z))
    with np.errstate(all="ignore"):
        for first in range(0, len(z), _CHUNK):
            part = slice(first, first + _CHUNK)
            near = index[part]
            monic = _monic(coefficients, z[part])
            start = slopes[:, near]
            start *= z[part] - nodes[near]
            start += roots[:, near]
            found, settled = _weierstrass(monic, start)
            if not settled.all():
                found[:, ~settled] = _companion_roots(monic[:, ~settled])
            out[part] = np.abs(found).max(axis=0)
    return out


def disc_test(coefficients: FloatArray, z: ComplexArray) -> npt.NDArray[np.int8]:
    """Where all roots zeta of sum_kj c_kj zeta^k z^j lie in the open unit disc, by the Schur-Cohn reduction.

    About 20 operations a point for a four-step method; it computes no root. Source: J. J. H. Miller, J. Inst. Maths
    Applics 8 (1971) 397-406.

    Args:
        coefficients: ``(r + 1, K + 1)``.
        z: ``(n,)``, finite.

    Returns:
        ``(n,)``: 1 inside, -1 some root outside, 0 too close to the circle to say by this test.
    """
    out = np.empty(len(z), dtype=np.int8)
    with np.errstate(all="ignore"):
        for first in range(0, len(z), _CHUNK):
            part = slice(first, first + _CHUNK)
            out[part] = _reduce(_monic(coefficients, z[part]))
    return out


def _reduce(monic: ComplexArray) -> npt.NDArray[np.int8]:
    """p'(zeta) = (conj(a_n) p(zeta) - a_0 p*(zeta)) / zeta, again monic, as long as |a_0| < |a_n| = 1."""
    verdict = np.ones(monic.shape[1], dtype=np.int8)
    p = monic
    while len(p):
        last = p[0]
        margin = 1 - (last.real**2 + last.imag**2)
        decided = verdict == 1
        verdict[decided & ~(np.abs(margin) > _CLEAR)] = 0
        verdict[decided & (margin < -_CLEAR)] = -1
        mirrored = p[:0:-1].conj()
        p = p[1:] - last * mirrored
        p /= margin
    return verdict


def _monic(coefficients: FloatArray, z: ComplexArray) -> ComplexArray:
    rows = np.empty((len(coefficients), len(z)), dtype=complex)
    for row, c in zip(rows, coefficients, strict=True):
        row[:] = c[-1]
        for a in c[-2::-1]:
            row *= z
            row += a
    if np.any(coefficients[-1, 1:]) or coefficients[-1, 0] != 1:
        rows[:-1] /= rows[-1]
    return rows[:-1]


def _coarse_roots(
    coefficients: FloatArray, z: ComplexArray
) -> tuple[ComplexArray, ComplexArray, ComplexArray, npt.NDArray[np.intp]]:
    """Nodes of a grid over the points, the roots there ``(r, nodes)``, dzeta/dz, and the node nearest to each point."""

    def cells(x: FloatArray) -> tuple[FloatArray, npt.NDArray[np.intp]]:
        low, high = x.min(), x.max()
        step = (high - low) / _COARSE or 1.0
        index = np.minimum(((x - low) / step).astype(np.intp), _COARSE - 1)
        return low + step * (np.arange(_COARSE) + 0.5), index

    x, column = cells(z.real)
    y, row = cells(z.imag)
    nodes = (x[None, :] + 1j * y[:, None]).ravel()
    k, j = np.arange(coefficients.shape[0]), np.arange(coefficients.shape[1])
    with np.errstate(all="ignore"):
        roots = _companion_roots(_monic(coefficients, nodes))
        powers, in_z = roots[..., None] ** k, nodes[:, None] ** j
        by_z = np.einsum("rnk,kj,nj->rn", powers, coefficients, j * nodes[:, None] ** np.maximum(j - 1, 0))
        by_zeta = np.einsum("rnk,kj,nj->rn", k * roots[..., None] ** np.maximum(k - 1, 0), coefficients, in_z)
        slopes = -by_z / by_zeta
    # Near a branch point the slope is no guide.
    slopes[~(np.abs(slopes) * (x[1] - x[0] + y[1] - y[0]) < 1)] = 0
    return nodes, roots, slopes, row * _COARSE + column


def _companion_roots(monic: ComplexArray) -> ComplexArray:
    """The roots ``(r, n)`` of n monic polynomials without their leading coefficient, ``(r, n)``."""
    r, n = monic.shape
    finite = np.isfinite(monic).all(axis=0)
    companion = np.zeros((n, r, r), dtype=complex)
    companion[:, np.arange(1, r), np.arange(r - 1)] = 1
    companion[finite, :, -1] = -monic[:, finite].T
    roots = np.asarray(np.linalg.eigvals(companion), dtype=complex).T
    roots[:, ~finite] = np.inf
    return roots


def _weierstrass(
    monic: ComplexArray, x: ComplexArray, iterations: int = _ITERATIONS
) -> tuple[ComplexArray, npt.NDArray[np.bool_]]:
    """Roots ``(r, n)`` and whether they settled, from starting values ``x``."""
    r = len(monic)
    settled = np.zeros(x.shape[1], dtype=bool)
    value, difference, product = np.empty_like(x), np.empty_like(x[0]), np.empty_like(x)
    for done in range(1, iterations + 1):
        value[:] = x
        value += monic[-1]
        for a in monic[-2::-1]:
            value *= x
            value += a
        product.fill(1)
        for i in range(r):
            for j in range(i):
                np.subtract(x[i], x[j], out=difference)
                product[i] *= difference
                np.negative(difference, out=difference)
                product[j] *= difference
        value /= product
        x -= value
        # The next correction is of the order of the square of this one.
        settled = (np.abs(value).max(axis=0) <= 1e-8 * np.abs(x).max(axis=0)) & np.isfinite(x).all(axis=0)
        rest = np.flatnonzero(~settled)
        if len(rest) <= _LEFT_OVER:
            break
        if 4 * len(rest) < len(settled):  # go on with these alone
            x[:, rest], settled[rest] = _weierstrass(monic[:, rest], x[:, rest], iterations - done)
            break
    return x, settled
