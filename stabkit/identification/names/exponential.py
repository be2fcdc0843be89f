"""Exponential Runge-Kutta methods of several stages, by their coefficients: x' = f(x) - lambda x, h lambda = -log a.

Two families carry the linear part on exactly. Lawson's methods are those of Runge and Kutta for e^(lambda t) x, so that
a stage at the time c has the skip a^c. Methods of Cox and Matthews (ETD) have functions phi_k(z), z = log a, for
weights (Cox and Matthews 2002; Hochbruck and Ostermann 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix

_CLOSE = 1e-5  # coefficients of single precision networks, multiplied and divided by some others
_FEWEST = 1e-4  # of |log a|: below it the weights are those of a Runge-Kutta method to the rounding of single precision

Tableau = tuple[Matrix, Matrix, Matrix]  # A over h, U, b over h


def phi(k: int, z: float) -> float:
    """The integral of e^((1 - s) z) s^(k - 1) / (k - 1)! over [0, 1]; e^z for k = 0.

    Example:
        >>> phi(1, 0.0), phi(2, 0.0)
        (1.0, 0.5)
    """
    return sum(z**j / math.factorial(j + k) for j in range(60))


def exponential_step(found: Blocks) -> tuple[str, float] | None:
    """Name and h of an exponential method of one field and several stages; None for others.

    Example:
        >>> z, h = -0.2, 0.1
        >>> A, b = np.array([[0, 0], [h * phi(1, z), 0]]), h * np.array([[phi(1, z) - phi(2, z), phi(2, z)]])
        >>> table = Blocks(A, np.array([[1.0], [math.exp(z)]]), b, np.array([[math.exp(z)]]), (0, 0), ())
        >>> name, h = exponential_step(table)
        >>> name, round(h, 6)
        ('ETDRK2 (exponential Runge-Kutta, a = 0.819)', 0.1)
    """
    a, size = float(found.V[0, 0]), len(found.A)
    if size < 2 or found.n_fields != 1 or a <= 0 or abs(math.log(a)) < _FEWEST or not (found.U > 0).all():
        return None
    z, total = math.log(a), float(found.B[0].sum())
    h = total / phi(1, z)
    for name, make in _ETD.items():
        tableau = make(z) if abs(h) > 1e-12 else None
        if tableau is not None and len(tableau[1]) == size and _is(found, tableau, h):
            return f"{name} (exponential Runge-Kutta, a = {a:.3g})", h
    return None


def carried_back(found: Blocks) -> Blocks | None:
    """The tableau of a method of Lawson in e^(lambda t) x, a Runge-Kutta method if it is one; None where a is 1."""
    a = float(found.V[0, 0])
    if a <= 0 or abs(math.log(a)) < _FEWEST or not (found.U > 0).all():
        return None
    z, c = math.log(a), np.log(found.U[:, 0]) / math.log(a)
    A = found.A * np.exp(-z * (c[:, None] - c[None, :]))
    return replace(found, A=A, U=np.ones_like(found.U), B=found.B * np.exp(-z * (1 - c))[None], V=np.ones((1, 1)))


def _is(found: Blocks, tableau: Tableau, h: float) -> bool:
    A, U, b = tableau
    ours, theirs = (found.A / h, found.U[:, 0], found.B[0] / h), (A, U, b)
    return all(np.allclose(x, y, rtol=0, atol=_CLOSE) for x, y in zip(ours, theirs, strict=True))


def _etdrk2(z: float) -> Tableau:
    A = np.array([[0, 0], [phi(1, z), 0]])
    return A, np.exp([0, z]), np.array([phi(1, z) - phi(2, z), phi(2, z)])


def _midpoint(z: float) -> Tableau:
    A = np.array([[0, 0], [phi(1, z / 2) / 2, 0]])
    return A, np.exp([0, z / 2]), np.array([phi(1, z) - 2 * phi(2, z), 2 * phi(2, z)])


def _etdrk3(z: float) -> Tableau:
    one, two, three = (phi(k, z) for k in (1, 2, 3))
    A = np.array([[0, 0, 0], [phi(1, z / 2) / 2, 0, 0], [-one, 2 * one, 0]])
    return A, np.exp([0, z / 2, z]), np.array([one - 3 * two + 4 * three, 4 * two - 8 * three, 4 * three - two])


def _weights_of_order_4(z: float) -> Matrix:
    one, two, three = (phi(k, z) for k in (1, 2, 3))
    middle = 2 * two - 4 * three
    return np.array([one - 3 * two + 4 * three, middle, middle, 4 * three - two])


def _etdrk4(z: float) -> Tableau:
    half, root = phi(1, z / 2) / 2, math.exp(z / 2)
    A = np.zeros((4, 4))
    A[1, 0] = A[2, 1] = half
    A[3, 0], A[3, 2] = half * (root - 1), 2 * half
    return A, np.exp([0, z / 2, z / 2, z]), _weights_of_order_4(z)


def _krogstad(z: float) -> Tableau:
    half, second = phi(1, z / 2) / 2, phi(2, z / 2)
    A = np.zeros((4, 4))
    A[1, 0], A[2, :2], A[3, [0, 2]] = half, (half - second, second), (phi(1, z) - 2 * phi(2, z), 2 * phi(2, z))
    return A, np.exp([0, z / 2, z / 2, z]), _weights_of_order_4(z)


_ETD: dict[str, Callable[[float], Tableau]] = {
    "ETDRK2": _etdrk2,
    "ETDRK2 (midpoint)": _midpoint,
    "ETDRK3": _etdrk3,
    "ETDRK4": _etdrk4,
    "ETDRK4 (Krogstad)": _krogstad,
}
