"""The numerical range W(A) = {x^H A x : ||x|| = 1} of a real matrix: its boundary, abscissa and radius.

C. R. Johnson, SIAM J. Numer. Anal. 15 (1978) 595: the support function of W(A) in the direction exp(-i theta) is
the largest eigenvalue of the Hermitian part of exp(i theta) A.
"""

from __future__ import annotations

import numpy as np

from stabkit.threads import single_threaded

_EXACT = 64  # up to this size the exact eigenvalue is as cheap as the iteration
_CLOSE = 1e-3  # relative accuracy of a height: half a pixel in a picture


def support(A: np.ndarray, theta: float) -> tuple[float, complex]:
    """Max Re(exp(i theta) w) over w in W(A), and the boundary point w that attains it."""
    import scipy.linalg

    n = len(A)
    rotated = np.exp(1j * theta) * A if np.sin(theta) else np.cos(theta) * A
    hermitian = (rotated + rotated.conj().T) / 2
    values, vectors = scipy.linalg.eigh(hermitian, subset_by_index=[n - 1, n - 1])
    if not len(values):  # LAPACK's bisection finds no last one where all coincide, as for an antisymmetric A
        values, vectors = np.linalg.eigh(hermitian)
    return float(values[-1]), complex(np.vdot(vectors[:, -1], A @ vectors[:, -1]))


def numerical_range(A: np.ndarray, angles: int) -> tuple[np.ndarray, float]:
    """Boundary points of W(A), counterclockwise and symmetric about the real axis, and the numerical radius.

    Args:
        A: real ``(n, n)``.
        angles: how many directions around the circle (at least 4).

    Returns:
        points ``(2 (angles // 2),)`` complex, and max |w| over W(A), refined between the directions.
    """
    from scipy.optimize import minimize_scalar

    half = angles // 2
    grid = np.linspace(0, np.pi, half + 1)
    heights, upper = zip(*(support(A, -theta) for theta in grid), strict=True)
    points = np.concatenate([upper, np.conj(upper[-2:0:-1])])
    radius = max(heights)
    for i in np.argsort(heights)[::-1][:2]:  # the support function may have several maxima
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, half)]
        best = minimize_scalar(
            lambda t: -support(A, -t)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-7}
        )
        radius = max(radius, -float(best.fun))
    return points, radius


def outline(A: np.ndarray, angles: int) -> np.ndarray:
    """Points of W(A) at its boundary as in `numerical_range`, to the accuracy of a picture and much faster when large.

    Lanczos iterations, each started from the vector of the direction before; every point lies in W(A).

    Args:
        A: real ``(n, n)``.
        angles: how many directions around the circle (at least 4).

    Example:
        >>> A = np.array([[0.0, 1.0], [0.0, 0.0]])  # W is the disc of radius 1/2
        >>> bool(np.allclose(abs(outline(A, 16)), 0.5))
        True
    """
    half = angles // 2
    # a start that is an eigenvector already would never find another
    noise = np.random.default_rng(0).normal(size=len(A)) / np.sqrt(len(A))
    upper, vector = [], np.zeros(len(A), dtype=complex)
    with single_threaded(len(A)):
        for theta in np.linspace(0, np.pi, half + 1):
            if len(A) <= _EXACT:
                upper.append(support(A, -theta)[1])
                continue
            vector = _leading(np.exp(-1j * theta) * A, vector + noise)
            upper.append(complex(np.vdot(vector, A @ vector)))
    return np.concatenate([upper, np.conj(upper[-2:0:-1])])


def _leading(rotated: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The unit vector of the largest eigenvalue of the Hermitian part."""
    from scipy.sparse.linalg import ArpackError, eigsh

    hermitian = (rotated + rotated.conj().T) / 2
    try:
        _, vectors = eigsh(hermitian, k=1, which="LA", tol=_CLOSE, v0=start)
    except ArpackError:  # a crowded top of the spectrum, or a matrix of zeros
        _, vectors = np.linalg.eigh(hermitian)
    found: np.ndarray = vectors[:, -1]
    return found
