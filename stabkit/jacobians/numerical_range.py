"""The numerical range W(A) = {x^H A x : ||x|| = 1} of a real matrix: its boundary, abscissa and radius.

C. R. Johnson, SIAM J. Numer. Anal. 15 (1978) 595: the support function of W(A) in the direction exp(-i theta) is
the largest eigenvalue of the Hermitian part of exp(i theta) A.
"""

from __future__ import annotations

import numpy as np


def support(A: np.ndarray, theta: float) -> tuple[float, complex]:
    """Max Re(exp(i theta) w) over w in W(A), and the boundary point w that attains it."""
    import scipy.linalg

    n = len(A)
    rotated = np.exp(1j * theta) * A if np.sin(theta) else np.cos(theta) * A
    hermitian = (rotated + rotated.conj().T) / 2
    value, x = scipy.linalg.eigh(hermitian, subset_by_index=[n - 1, n - 1])
    return float(value[0]), complex(np.vdot(x[:, 0], A @ x[:, 0]))


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
