from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit import integrators


def rk4(f, y):
    k1 = f(y)
    k2 = f(y + k1 / 2)
    k3 = f(y + 0.5 * k2)
    k4 = f(y + k3)
    return y + (k1 + 2 * k2 + 2 * k3 + k4) / 6


def test_runge_kutta_step_gives_its_tableau():
    assert integrators.from_step_function(rk4) == integrators.named("rk4")


def test_floats_of_simple_fractions_are_recognised():
    method = integrators.from_step_function(lambda f, y: y + 0.1 * f(y) + (1 / 3) * f(y))
    assert method.is_exact
    assert [[Fraction(13, 30)]] == method.tableau.B


def test_step_with_memory():
    method = integrators.from_step_function(lambda f, y: [y[1] + 2 * f(y[0]), y[0]], states=2)
    assert method == integrators.named("leapfrog")


def test_step_with_two_fields():
    def block(f, x):
        attention, feed_forward = f
        x = x + attention(x)
        return x + feed_forward(x)

    assert integrators.from_step_function(block, fields=2) == integrators.named("lie")


def test_implicit_step_is_read_from_exact_values():
    def trapezoid(f, y):
        z = f(1) if not isinstance(y, complex) else f(1.0)  # solves the linear equation: more than linear arithmetic
        return (y + f(y) / 2) / (1 - z / 2)

    method = integrators.from_step_function(trapezoid)
    assert method.characteristic.numerator == (1, Fraction(1, 2))
    assert method.characteristic.denominator == (1, Fraction(-1, 2))


def test_numpy_step_is_read_from_complex_values():
    def radau(f, y):
        z = complex(np.asarray(f(1.0 + 0j)))
        A = np.array([[5 / 12, -1 / 12], [3 / 4, 1 / 4]])
        stages = np.linalg.solve(np.eye(2) - z * A, np.ones(2) * complex(y))
        return stages[1]

    method = integrators.from_step_function(radau)
    assert method.characteristic == integrators.named("radau_iia2").characteristic


@settings(deadline=None, max_examples=30)
@given(st.lists(st.fractions(-3, 3, max_denominator=12), min_size=1, max_size=5))
def test_polynomial_is_recovered_exactly(coefficients):
    def horner(f, y):
        out = coefficients[-1] * y
        for c in reversed(coefficients[:-1]):
            out = f(out) + c * y
        return out

    numerator = list(integrators.from_step_function(horner).characteristic.numerator)
    while coefficients and coefficients[-1] == 0:
        coefficients.pop()
    assert numerator == coefficients


def test_nonlinear_steps_are_refused():
    with pytest.raises(ValueError, match="not linear in y"):
        integrators.from_step_function(lambda f, y: y + f(y) + 1)
    with pytest.raises(ValueError, match="no rational function"):
        integrators.from_step_function(lambda f, y: complex(y) * np.exp(complex(f(1.0))))
    with pytest.raises(ValueError, match="only be read from linear arithmetic"):
        integrators.from_step_function(lambda f, y: [y[0] * y[1], y[0]], states=2)
