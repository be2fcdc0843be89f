from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit import meanfield


@pytest.mark.parametrize("phi", ["tanh", "gelu", "silu", "hardtanh"])
def test_maps_agree_with_a_monte_carlo_layer(phi: str):
    rng = np.random.default_rng(0)
    q, c, n = 1.7, 0.4, 400_000
    first, other = rng.standard_normal((2, n)) * q**0.5
    second = c * first + math.sqrt(1 - c * c) * other
    function = meanfield.activation(phi).function
    slope = meanfield.activation(phi).derivative
    square = np.mean(function(first) ** 2)
    assert float(meanfield.variance_map(phi, q, sigma_w=1.5, sigma_b=0.3)) == pytest.approx(
        2.25 * square + 0.09, rel=0.01
    )
    expected = (2.25 * np.mean(function(first) * function(second)) + 0.09) / (2.25 * square + 0.09)
    assert float(meanfield.correlation_map(phi, c, q, sigma_w=1.5, sigma_b=0.3)) == pytest.approx(expected, abs=0.01)
    assert float(meanfield.chi_1(phi, q, sigma_w=1.5)) == pytest.approx(2.25 * np.mean(slope(first) ** 2), rel=0.01)
    assert float(meanfield.chi_c(phi, c, q, sigma_w=1.5)) == pytest.approx(
        2.25 * np.mean(slope(first) * slope(second)), rel=0.02
    )


@pytest.mark.parametrize("phi", ["tanh", "relu", "gelu", "hardtanh", "sigmoid"])
def test_chi_parallel_is_the_slope_of_the_variance_map(phi: str):
    q, step = 0.8, 1e-5
    up, down = (float(meanfield.variance_map(phi, q + s, sigma_w=1.3)) for s in (step, -step))
    assert float(meanfield.chi_parallel(phi, q, sigma_w=1.3)) == pytest.approx((up - down) / (2 * step), rel=1e-7)


def test_chi_1_is_the_slope_of_the_correlation_map_at_one():
    q = meanfield.fixed_point("tanh", sigma_w=2.0).q
    step = 1e-4
    slope = (1 - float(meanfield.correlation_map("tanh", 1 - step, q, sigma_w=2.0))) / step
    assert slope == pytest.approx(float(meanfield.chi_1("tanh", q, sigma_w=2.0)), rel=1e-3)


def test_erf_kernels_match_their_formulas():
    q, c = 0.9, 0.3
    product = (2 / math.pi) * math.asin(2 * q * c / (1 + 2 * q))
    square = (2 / math.pi) * math.asin(2 * q / (1 + 2 * q))
    assert float(meanfield.correlation_map("erf", c, q, sigma_w=1.0)) == pytest.approx(product / square, rel=1e-13)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"q": -1.0, "sigma_w": 1.0}, "q=-1.0"), ({"q": 1.0, "sigma_w": math.nan}, "sigma_w=nan")],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, float], named: str):
    with pytest.raises(ValueError, match=named):
        meanfield.variance_map("tanh", **arguments)
    with pytest.raises(ValueError, match=r"c=1\.5"):
        meanfield.chi_c("tanh", 1.5, 1.0, sigma_w=1.0)


def test_an_expectation_carries_its_error_and_method():
    found = meanfield.variance_map("tanh", 1.0, sigma_w=1.0)
    assert found.method == "quadrature"
    assert 0 < found.error < 1e-11
    assert set(found.to_dict()) == {"value", "error", "method"}
