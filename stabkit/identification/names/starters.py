"""Methods of Adams and Bashforth behind their starters: a step of one state that holds several steps of them.

    x_1 = R(x_0),    x_(n+1) = x_n + h sum_j b_j f(x_(n-j)),

as an explicit Runge-Kutta tableau of one field. A row of A says where a stage is evaluated, so the difference of two
rows after each other is what one step adds (Hairer, Norsett and Wanner 1993, III.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from stabkit.integrators.multistep import quadrature_weights

Matrix = npt.NDArray[np.float64]
_CLOSE = 1e-5  # relative to the largest weight, which of high orders are sums of many of both signs
_HIGHEST = 12  # order that is tried, which is torchdiffeq's


def ends_of_parts(A: Matrix, b: Matrix) -> list[int]:
    """Where parts of a tableau end: all later stages, and the result, take what is before with the result's weights."""
    near = _CLOSE * float(np.abs(b).max(initial=0.0))
    return [c for c in range(1, len(A)) if np.allclose(A[c:, :c], b[:c], rtol=0, atol=near)]


def adams_behind(A: Matrix, b: Matrix) -> Iterator[tuple[int, float, list[int]]]:
    """How many stages the starters have, the step size, and the orders of the steps behind, for every way to see it.

    Example:
        >>> A = np.array([[0, 0, 0], [0.1, 0, 0], [0.05, 0.15, 0]])  # Euler, then twice Adams-Bashforth of order 2
        >>> [(count, orders) for count, _, orders in adams_behind(A, np.array([0.05, 0.1, 0.15]))]
        [(1, [2, 2])]
    """
    rows, s = np.vstack([A, b]), len(A)
    for count in range(1, s):
        states = [0, *ends_of_parts(A[:count, :count], rows[count, :count])]
        orders, sizes = [], []
        for j in range(count, s):
            states.append(j)
            added = rows[j + 1] - rows[j]
            size, order = float(added.sum()), _order(added, states)
            if order is None:
                break
            orders.append(order)
            sizes.append(size)
        if len(orders) == s - count and np.ptp(sizes) <= _CLOSE * abs(sizes[0]):
            yield count, sizes[0], orders


def _order(added: Matrix, states: list[int]) -> int | None:
    """The order of the method whose weights a step has for the newest values of the field, and none for others."""
    h, newest = added.sum(), states[::-1]
    for k in range(2, min(len(newest), _HIGHEST) + 1):
        weights = np.zeros(len(added))
        weights[newest[:k]] = h * _bashforth(k)
        if np.allclose(weights, added, rtol=0, atol=_CLOSE * np.abs(weights).max()):
            return k
    return None


@cache
def _bashforth(order: int) -> Matrix:
    """The weights of the newest values of the field, the newest first."""
    return np.array(quadrature_weights(range(order), order - 1, order)[::-1], dtype=float)


def told_of(orders: list[int]) -> str:
    """Steps of some orders in words.

    Example:
        >>> told_of([2, 3, 3, 3])
        'ab2 and then 3 steps of ab3'
    """
    runs = [(k, len(list(run))) for k, run in itertools.groupby(orders)]
    return " and then ".join(f"ab{k}" if n == 1 else f"{n} steps of ab{k}" for k, n in runs)
