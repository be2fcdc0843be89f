from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import dblquad, quad

from stabkit.meanfield.gaussian import integrate, mean, pair_mean


def test_quadrature_rule_is_exact_for_polynomials():
    value, _ = integrate(lambda x: np.stack([x**20, x**31 + 1]), [-1.0, 1.0])
    assert value == pytest.approx([2 / 21, 2.0], rel=1e-14)


@pytest.mark.parametrize("q", [0.01, 1.0, 12.6, 400.0])
def test_fourth_power_of_sech_agrees_with_scipy(q: float):
    # the case in which Gauss-Hermite rules are wrong
    def integrand(h: float) -> float:
        return math.cosh(h) ** -4 * math.exp(-h * h / (2 * q)) / math.sqrt(2 * math.pi * q)

    truth, _ = quad(integrand, -30, 30, points=[0], epsabs=0, epsrel=1e-12, limit=400)
    value, error = mean(lambda h: (1 - np.tanh(h) ** 2) ** 2, q)
    assert abs(value - truth) <= max(float(error), 1e-12)


def test_error_estimate_covers_a_function_with_a_kink():
    value, error = mean(lambda h: np.abs(h - 0.3), 1.0)
    density = math.exp(-0.045) / math.sqrt(2 * math.pi)
    truth = 2 * density + 0.3 * math.erf(0.3 / math.sqrt(2))
    assert abs(value - truth) <= max(float(error), 1e-13) < 1e-11


@settings(deadline=None, max_examples=25)
@given(st.floats(-1, 1), st.floats(0.01, 50), st.floats(0.01, 50))
def test_relu_kernel_agrees_with_cho_and_saul(c: float, first: float, second: float):
    value, error = pair_mean(lambda h: np.maximum(h, 0), (first, second), c, (0.0,))
    angle = math.sqrt(max(0.0, 1 - c * c)) + c * (math.pi - math.acos(c))
    truth = math.sqrt(first * second) * angle / (2 * math.pi)
    scale = math.sqrt(first * second)
    assert abs(value - truth) <= 1e-10 * scale
    assert error <= 1e-8 * scale


def test_tanh_kernel_agrees_with_scipy():
    q, c = 2.0, 0.4

    def integrand(y: float, x: float) -> float:
        second = c * x + math.sqrt(1 - c * c) * y
        return math.tanh(q**0.5 * x) * math.tanh(q**0.5 * second) * math.exp(-(x * x + y * y) / 2) / (2 * math.pi)

    truth, _ = dblquad(integrand, -8, 8, -8, 8, epsabs=1e-9)
    assert pair_mean(np.tanh, (q, q), c)[0] == pytest.approx(truth, abs=1e-8)
