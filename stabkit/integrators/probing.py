"""A method read off a Python function that makes one step, by running it on symbols or on numbers z.

First the step is run on linear forms in the states and the stage values: that gives the tableau itself. Where the
code does more than linear arithmetic (a solve inside the step), it is run on y' = z y for many z instead, and the
polynomial or rational function R(z) is recovered from its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators.construction import from_stability_function
from stabkit.integrators.general_linear import GeneralLinearMethod, Tableau, from_tableau
from stabkit.integrators.rational_matrices import Matrix, solve
from stabkit.integrators.rational_polynomials import evaluate, trimmed
from stabkit.integrators.tableau_checks import to_fraction

Step = Callable[[Any, Any], Any]

_HIGHEST_DEGREE = 16
_AGREEMENT = 1e-10


class _NotLinearError(TypeError):
    """The step did something to a state that is not linear arithmetic."""


class LinearForm:
    """A linear combination of the states and of the values of f, with exact coefficients."""

    __array_ufunc__ = None  # numpy scalars then defer to the methods below

    def __init__(self, terms: dict[int, Fraction]) -> None:
        self.terms = {k: c for k, c in terms.items() if c}

    def _plus(self, other: Any, sign: int) -> LinearForm:
        if not isinstance(other, LinearForm):
            if isinstance(other, int | float) and other == 0:
                return self  # the start of Python's sum()
            raise _NotLinearError(f"adding {other!r} to a state")
        out = dict(self.terms)
        for k, c in other.terms.items():
            out[k] = out.get(k, Fraction(0)) + sign * c
        return LinearForm(out)

    def _times(self, factor: Any, *, inverse: bool = False) -> LinearForm:
        if isinstance(factor, LinearForm) or (not np.isscalar(factor) and not isinstance(factor, Fraction)):
            raise _NotLinearError(f"multiplying a state by {type(factor).__name__}")
        number = simple_fraction(factor)
        return LinearForm({k: c / number if inverse else c * number for k, c in self.terms.items()})

    def __add__(self, other: Any) -> LinearForm:
        return self._plus(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> LinearForm:
        return self._plus(other, -1)

    def __rsub__(self, other: Any) -> LinearForm:
        return (-self)._plus(other, 1)

    def __neg__(self) -> LinearForm:
        return self._times(-1)

    def __mul__(self, other: Any) -> LinearForm:
        return self._times(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> LinearForm:
        return self._times(other, inverse=True)


def simple_fraction(value: Any) -> Fraction:
    """A coefficient as a fraction; a float within two roundings of a fraction with denominator <= 10000 is that.

    Example:
        >>> simple_fraction(1 / 6)
        Fraction(1, 6)
    """
    exact = to_fraction(value)
    simple = exact.limit_denominator(10**4)
    return simple if abs(simple - exact) <= Fraction(5, 10**16) * abs(exact) else exact


@accepts
def from_step_function(step: Step, *, states: int = 1, fields: int = 1, name: str = "") -> GeneralLinearMethod:
    """The method that a function performs in one step of size 1.

    Args:
        step: ``step(f, y) -> y'``. With several states y is a list and a list is returned; with several fields f is a
            list of functions.
        states: how many states the step carries.
        fields: how many fields it evaluates.
        name: shown in results.

    Returns:
        The method with its tableau when the step uses only linear arithmetic and f; otherwise one with the same
        stability function (one state and one field only).

    Raises:
        ArgumentError: the step is not linear in the states, or R(z) is no rational function of degree up to 16.

    Example:
        >>> def midpoint(f, y):
        ...     return y + f(y + f(y) / 2)
        >>> from_step_function(midpoint).tableau.A
        [[Fraction(0, 1), Fraction(0, 1)], [Fraction(1, 2), Fraction(0, 1)]]
    """
    try:
        return _from_linear_forms(step, states, fields, name)
    except (TypeError, AttributeError, ValueError) as error:
        if states != 1 or fields != 1:
            raise ArgumentError(
                f"the step is not linear arithmetic on its states ({error}); with states={states} and "
                f"fields={fields} it can only be read from linear arithmetic"
            ) from error
    numerator, denominator = _exact_rational(step) or _fitted_rational(step)
    return from_stability_function(numerator, denominator, name=name)


def _from_linear_forms(step: Step, states: int, fields: int, name: str) -> GeneralLinearMethod:
    calls: list[tuple[int, LinearForm]] = []

    def field_at(field: int) -> Callable[[Any], LinearForm]:
        def f(y: Any) -> LinearForm:
            if not isinstance(y, LinearForm):
                raise _NotLinearError(f"f was called on {type(y).__name__}")
            for k, (other, form) in enumerate(calls):
                if other == field and form.terms == y.terms:
                    return LinearForm({states + k: Fraction(1)})
            calls.append((field, y))
            return LinearForm({states + len(calls) - 1: Fraction(1)})

        return f

    x = [LinearForm({j: Fraction(1)}) for j in range(states)]
    f = [field_at(k) for k in range(fields)]
    result = step(f if fields > 1 else f[0], x if states > 1 else x[0])
    out = [result] if states == 1 else list(result)
    if len(out) != states or not all(isinstance(form, LinearForm) for form in out):
        raise _NotLinearError(f"the step returned {result!r}")
    s = len(calls)

    def rows(forms: Sequence[LinearForm], start: int, stop: int) -> Matrix:
        return [[form.terms.get(k, Fraction(0)) for k in range(start, stop)] for form in forms]

    inputs = [form for _, form in calls]
    tableau = Tableau(
        rows(inputs, states, states + s), rows(inputs, 0, states), rows(out, states, states + s), rows(out, 0, states)
    )
    exact = all(c.denominator < 10**12 for block in tableau for row in block for c in row)
    return from_tableau(tableau, exact=exact, fields=[field for field, _ in calls], name=name)


def _exact_rational(step: Step) -> tuple[list[Fraction], list[Fraction]] | None:
    """R from exact values at rational z, or None when the step leaves exact arithmetic."""
    nodes = [Fraction(2 * k + 1, 7) * (-1) ** k for k in range(2 * _HIGHEST_DEGREE + 6)]
    values = []
    try:
        for z in nodes:
            value, double = (step(lambda y, z=z: z * y, Fraction(start)) for start in (1, 2))
            if not isinstance(value, Fraction | int) or double != 2 * value:
                return None  # floats, or not linear in y: the fit below says so
            values.append(Fraction(value))
    except (TypeError, AttributeError, ZeroDivisionError, ValueError):
        return None
    for degree in range(_HIGHEST_DEGREE + 1):
        for bottom in sorted({0, degree}):
            found = _rational_through(nodes, values, degree, bottom)
            if found is not None:
                return found
    return None


def _rational_through(
    nodes: Sequence[Fraction], values: Sequence[Fraction], top: int, bottom: int
) -> tuple[list[Fraction], list[Fraction]] | None:
    """N and D with D(0) = 1 and N = R D at the first nodes, if that holds at all the others too."""
    size = top + bottom + 1
    rows = [
        [z**k for k in range(top + 1)] + [-r * z**k for k in range(1, bottom + 1)]
        for z, r in zip(nodes[:size], values[:size], strict=True)
    ]
    try:
        solution = [row[0] for row in solve(rows, [[r] for r in values[:size]])]
    except ZeroDivisionError:
        return None
    N, D = solution[: top + 1], [Fraction(1), *solution[top + 1 :]]
    if all(evaluate(N, z) == r * evaluate(D, z) for z, r in zip(nodes, values, strict=True)):
        return trimmed(N), trimmed(D)
    return None


def _fitted_rational(step: Step) -> tuple[list[Any], list[Any]]:
    """R from complex floating-point values: least squares, then recognition of simple rationals."""
    rng = np.random.default_rng(0)
    z = rng.uniform(0.2, 1.6, 96) * np.exp(2j * np.pi * rng.uniform(size=96))
    try:
        R = np.array([complex(step(lambda y, a=a: a * y, 1.0 + 0j)) for a in z])
    except (TypeError, AttributeError) as error:
        raise ArgumentError(f"the step could not be run on complex numbers: {error}") from error
    scaled = np.array([complex(step(lambda y, a=a: a * y, 2.0 + 0j)) for a in z[:4]])
    if not np.all(np.isfinite(R)) or np.abs(scaled - 2 * R[:4]).max() > 1e-9 * np.abs(R[:4]).max():
        raise ArgumentError("the step is not linear in y on the test problem y' = z y; remove constants from it")
    for degree in range(_HIGHEST_DEGREE + 1):
        for bottom in sorted({0, degree}):
            powers = z[:, None] ** np.arange(max(degree, bottom) + 1)
            system = np.hstack([powers[:, : degree + 1], -R[:, None] * powers[:, 1 : bottom + 1]])
            both = np.vstack([system.real, system.imag])
            right = np.concatenate([R.real, R.imag])
            solution, _, rank, _ = np.linalg.lstsq(both, right, rcond=1e-13)
            miss = np.abs(system @ solution - R).max()
            if rank == both.shape[1] and miss < _AGREEMENT * max(1.0, np.abs(R).max()):
                found = _recognised(solution, degree, z, R)
                if _holds_far_out(step, *found):
                    return found
    raise ArgumentError(
        f"R(z) is no rational function of degree up to {_HIGHEST_DEGREE}; give a StabilityFunction instead"
    )


def _holds_far_out(step: Step, numerator: Sequence[Any], denominator: Sequence[Any]) -> bool:
    """Whether N / D is right beyond the points that it was fitted to, which no approximation of another function is."""
    for z in (-25.0 + 0j, 20j, -12 + 9j):
        top, bottom = (sum(float(c) * z**k for k, c in enumerate(p)) for p in (numerator, denominator))
        R = complex(step(lambda y, a=z: a * y, 1.0 + 0j))
        if not abs(top - R * bottom) <= 1e-4 * max(abs(bottom), abs(R * bottom)):
            return False
    return True


def _recognised(solution: Any, top: int, z: Any, R: Any) -> tuple[list[Any], list[Any]]:
    N, D = list(solution[: top + 1]), [1.0, *solution[top + 1 :]]
    simple = [[_near_fraction(c) for c in p] for p in (N, D)]
    numerator, denominator = (np.polyval([float(c) for c in reversed(p)], z) for p in simple)
    if np.abs(numerator / denominator - R).max() < 1e-12 * max(1.0, np.abs(R).max()):
        return simple[0], simple[1]
    return N, D


def _near_fraction(c: float) -> Fraction:
    if abs(c) < 1e-9:
        return Fraction(0)
    if abs(c) >= 1:
        return Fraction(c).limit_denominator(2000)
    return 1 / Fraction(1 / c).limit_denominator(500)
