"""Strong stability preservation and the propagation of stage errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from stabkit.integrators.rational_matrices import Matrix, solve

_UNBOUNDED = Fraction(2**30)
_EXACT_SIZE = 14  # exact bisection beyond this size costs more than it tells
_ROUNDING = 1e-13


def ssp_coefficient(A: Matrix, U: Matrix, B: Matrix, V: Matrix, *, exact: bool) -> float:
    """The largest C such that steps of size up to C times the forward Euler limit keep every convex bound.

    The method is y = S x + T F(y) with S = [U; V] and T = [[A, 0], [B, 0]]; C is the largest g with
    (I + g T)^-1 [S, g T] >= 0. Sources: J. F. B. M. Kraaijevanger, BIT 31 (1991) 482-528; M. N. Spijker, SIAM J.
    Numer. Anal. 45 (2007) 1226-1245 (general linear methods).

    Args:
        A: ``(s, s)``.
        U: ``(s, r)``.
        B: ``(r, s)``.
        V: ``(r, r)``.
        exact: whether the entries are exact; otherwise signs are decided with a rounding allowance of 1e-13.

    Returns:
        C >= 0; ``inf`` for backward Euler.
    """
    size = len(A) + len(B)
    S = [*U, *V]
    T = [[*row, *([Fraction(0)] * len(B))] for row in [*A, *B]]
    exactly = exact and size <= _EXACT_SIZE

    def holds(g: Fraction) -> bool:
        return _is_monotone_exactly(S, T, g) if exactly else _is_monotone(S, T, float(g))

    if not holds(Fraction(0)) or not holds(Fraction(1, 2**40)):
        return 0.0
    if holds(_UNBOUNDED):
        return math.inf
    low, high = Fraction(0), Fraction(1)
    while holds(high):
        low, high = high, 2 * high
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    simple = high.limit_denominator(10**4)
    return float(simple if abs(simple - low) < Fraction(1, 10**11) and holds(simple) else low)


def _is_monotone_exactly(S: Matrix, T: Matrix, g: Fraction) -> bool:
    size = len(T)
    system = [[(i == j) + g * T[i][j] for j in range(size)] for i in range(size)]
    try:
        solution = solve(system, [[*s, *(g * t for t in row)] for s, row in zip(S, T, strict=True)])
    except ZeroDivisionError:
        return False
    return all(x >= 0 for row in solution for x in row) and (g > 0 or all(t >= 0 for row in T for t in row))


def _is_monotone(S: Matrix, T: Matrix, g: float) -> bool:
    matrix = np.array([[float(t) for t in row] for row in T])
    states = np.array([[float(s) for s in row] for row in S])
    try:
        solution = np.linalg.solve(np.eye(len(T)) + g * matrix, np.hstack([states, g * matrix]))
    except np.linalg.LinAlgError:
        return False
    return bool(np.all(solution >= -_ROUNDING) and (g > 0 or np.all(matrix >= 0)))


def internal_amplification(
    tableau: Sequence[npt.NDArray[np.float64]], z: npt.NDArray[np.complex128]
) -> npt.NDArray[np.float64]:
    """How strongly an error made in one stage appears in the result: max over stages of |Q_j(z)|.

    Q(z) = z B (I - z A)^-1, the internal stability polynomials of the tableau form, without the stages that only copy
    the states and so carry no error of their own. Source: D. I. Ketcheson, L. Loczi, M. Parsani, SIAM J. Numer. Anal.
    52 (2014) 2226-2249.

    Args:
        tableau: A, U, B, V as floats.
        z: any shape ``(...)``.

    Returns:
        ``(...)``; ``inf`` at a pole.
    """
    A, _, B, _ = tableau
    flat = z.reshape(-1)
    system = np.eye(len(A)) - flat[:, None, None] * A
    singular = np.linalg.det(system) == 0
    system[singular] = np.eye(len(A))
    Q = flat[:, None, None] * np.swapaxes(
        np.linalg.solve(np.swapaxes(system, 1, 2), np.broadcast_to(B.T, (len(flat), *B.T.shape))), 1, 2
    )
    computed = np.any(A, axis=1)
    return np.where(singular, np.inf, np.abs(Q[:, :, computed]).max(axis=(1, 2), initial=0.0)).reshape(z.shape)
