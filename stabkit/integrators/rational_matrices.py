"""Small matrices of fractions and of Gaussian integers: determinants and definiteness decided without rounding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Matrix = list[list[Fraction]]

#: A Gaussian integer a + i b as the pair (a, b).
Gaussian = tuple[int, int]


def identity(n: int) -> Matrix:
    """The n by n identity."""
    return [[Fraction(int(i == j)) for j in range(n)] for i in range(n)]


def matmul(A: Sequence[Sequence[Fraction]], B: Sequence[Sequence[Fraction]]) -> Matrix:
    """The product A B; zero entries cost nothing."""
    width = len(B[0]) if B else 0
    out = [[Fraction(0)] * width for _ in A]
    for i, row in enumerate(A):
        for k, a in enumerate(row):
            if a:
                for j, b in enumerate(B[k]):
                    if b:
                        out[i][j] += a * b
    return out


def determinant(A: Sequence[Sequence[Fraction]]) -> Fraction:
    """The determinant, by elimination with exact arithmetic.

    Example:
        >>> determinant([[Fraction(1, 3), Fraction(1)], [Fraction(1), Fraction(6)]])
        Fraction(1, 1)
    """
    rows, total = [list(row) for row in A], Fraction(1)
    for k in range(len(rows)):
        pivot = next((i for i in range(k, len(rows)) if rows[i][k]), None)
        if pivot is None:
            return Fraction(0)
        if pivot != k:
            rows[k], rows[pivot] = rows[pivot], rows[k]
            total = -total
        total *= rows[k][k]
        _eliminate(rows, k)
    return total


def solve(A: Sequence[Sequence[Fraction]], B: Sequence[Sequence[Fraction]]) -> Matrix:
    """The solution X of A X = B.

    Raises:
        ZeroDivisionError: ``A`` is singular.
    """
    n = len(A)
    rows = [[*a, *b] for a, b in zip(A, B, strict=True)]
    for k in range(n):
        pivot = next((i for i in range(k, n) if rows[i][k]), None)
        if pivot is None:
            raise ZeroDivisionError("the matrix is singular")
        rows[k], rows[pivot] = rows[pivot], rows[k]
        _eliminate(rows, k)
    for k in range(n - 1, -1, -1):
        rows[k] = [a / rows[k][k] for a in rows[k]]
        for i in range(k):
            if rows[i][k]:
                rows[i] = [a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)]
    return [row[n:] for row in rows]


def _eliminate(rows: Matrix, k: int) -> None:
    for i in range(k + 1, len(rows)):
        if rows[i][k]:
            ratio = rows[i][k] / rows[k][k]
            rows[i] = [a - ratio * b for a, b in zip(rows[i], rows[k], strict=True)]


def hermitian_pivots(H: Sequence[Sequence[Gaussian]]) -> list[int]:
    """The leading principal minors of a Hermitian matrix of Gaussian integers, up to the first that vanishes.

    All n of them are positive exactly when the matrix is positive definite (Sylvester). Fraction-free elimination:
    E. H. Bareiss, Math. Comp. 22 (1968) 565-578.

    Example:
        >>> hermitian_pivots([[(2, 0), (0, 1)], [(0, -1), (2, 0)]])
        [2, 3]
    """
    rows, minors, previous = [list(row) for row in H], [], (1, 0)
    for k in range(len(rows)):
        minors.append(rows[k][k][0])
        if minors[-1] == 0:
            break
        _bareiss_step(rows, k, previous)
        previous = rows[k][k]
    return minors


def gaussian_determinant(H: Sequence[Sequence[Gaussian]]) -> Gaussian:
    """The determinant of a matrix of Gaussian integers.

    Example:
        >>> gaussian_determinant([[(0, 0), (0, 1)], [(0, -1), (0, 0)]])
        (-1, 0)
    """
    rows, sign, previous = [list(row) for row in H], 1, (1, 0)
    for k in range(len(rows)):
        pivot = next((i for i in range(k, len(rows)) if rows[i][k] != (0, 0)), None)
        if pivot is None:
            return 0, 0
        if pivot != k:
            rows[k], rows[pivot], sign = rows[pivot], rows[k], -sign
        _bareiss_step(rows, k, previous)
        previous = rows[k][k]
    return sign * previous[0], sign * previous[1]


def _bareiss_step(rows: list[list[Gaussian]], k: int, previous: Gaussian) -> None:
    (a, b), (c, d) = rows[k][k], previous
    norm = c * c + d * d
    for row in rows[k + 1 :]:
        e, f = row[k]
        for j in range(k + 1, len(row)):
            (g, h), (u, v) = row[j], rows[k][j]
            x = a * g - b * h - e * u + f * v
            y = a * h + b * g - e * v - f * u
            row[j] = ((x * c + y * d) // norm, (y * c - x * d) // norm)  # exact, by Sylvester's identity
