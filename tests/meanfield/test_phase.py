from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit import meanfield


@pytest.mark.parametrize(
    ("sigma_b_squared", "sigma_w_squared"), [(0.05, 1.76095), (0.01, 1.4242), (0.1, 1.9861), (0.3, 2.5051)]
)
def test_critical_line_of_tanh(sigma_b_squared: float, sigma_w_squared: float):
    sigma_w = meanfield.critical_sigma_w("tanh", sigma_b_squared**0.5)
    assert sigma_w**2 == pytest.approx(sigma_w_squared, abs=6e-5)
    (point,) = meanfield.critical_points("tanh", sigma_w=sigma_w)
    assert point.sigma_b**2 == pytest.approx(sigma_b_squared, rel=1e-9)
    at = meanfield.fixed_point("tanh", sigma_w=sigma_w, sigma_b=sigma_b_squared**0.5)
    assert at.phase == "critical"
    assert at.xi_c == math.inf


@pytest.mark.parametrize(("sigma_b", "sigma_w"), [(0.1, 1.193400725025), (0.2, 1.304145840057)])
def test_critical_weights_of_tanh_to_all_digits(sigma_b: float, sigma_w: float):
    (point,) = meanfield.critical_points("tanh", sigma_b=sigma_b)
    assert point.sigma_w == pytest.approx(sigma_w, abs=2e-12)
    assert point.error < 1e-10


def test_critical_weights_without_biases_are_those_of_the_slope_at_zero():
    assert meanfield.critical_sigma_w("tanh") == pytest.approx(1, abs=1e-9)
    assert meanfield.critical_sigma_w("erf") ** 2 == pytest.approx(math.pi / 4, abs=1e-9)
    assert meanfield.critical_sigma_w("relu") ** 2 == pytest.approx(2, abs=1e-12)


def test_ordered_phase():
    found = meanfield.fixed_point("tanh", sigma_w=1.3**0.5, sigma_b=0.05**0.5)
    assert (found.phase, found.c) == ("ordered", 1.0)
    assert found.chi_1 == pytest.approx(0.8802, abs=5e-5)
    assert found.xi_c == pytest.approx(7.83, abs=5e-3)
    assert found.xi_c == pytest.approx(-1 / math.log(found.chi_1))


@pytest.mark.parametrize(
    ("w", "b", "chi", "c", "q"), [(4.0, 0.05, 1.3424, 0.165, None), (16.0, 0.09, 2.367, 0.0297, 12.604)]
)
def test_chaotic_phase(w: float, b: float, chi: float, c: float, q: float | None):
    found = meanfield.fixed_point("tanh", sigma_w=w**0.5, sigma_b=b**0.5)
    assert found.phase == "chaotic"
    assert found.chi_1 == pytest.approx(chi, abs=3e-4)
    assert found.c == pytest.approx(c, abs=6e-5 if q else 6e-4)
    assert q is None or found.q == pytest.approx(q, abs=6e-4)
    assert found.residual < 1e-10
    assert found.chi_c < 1


def test_fixed_point_is_where_iteration_goes():
    q, sigma_w, sigma_b = 1.0, 1.8, 0.2
    for _ in range(200):
        q = float(meanfield.variance_map("tanh", q, sigma_w=sigma_w, sigma_b=sigma_b))
    assert meanfield.fixed_point("tanh", sigma_w=sigma_w, sigma_b=sigma_b).q == pytest.approx(q, rel=1e-10)


def test_variances_that_die_out_or_grow_without_end():
    assert meanfield.fixed_point("tanh", sigma_w=0.9).q == 0
    assert meanfield.fixed_point("relu", sigma_w=1.5).q == math.inf
    assert meanfield.fixed_point("relu", sigma_w=2**0.5, q_start=3.0).q == 3.0
    assert meanfield.fixed_point("relu", sigma_w=1.5).chi_1 == pytest.approx(1.125)


def test_half_stable_point_of_the_gelu():
    # chi_1 and chi_parallel are both 1 at q = (3 + sqrt 17) / 2 (Roberts, Yaida and Hanin, 2022, section 5.3)
    q = (3 + math.sqrt(17)) / 2
    sigma_w = 1 / float(meanfield.chi_1("gelu", q, sigma_w=1.0)) ** 0.5
    points = meanfield.critical_points("gelu", sigma_w=sigma_w)
    at = min(points, key=lambda point: abs(point.q - q))
    assert at.q == pytest.approx(q, rel=1e-6)
    assert at.chi_parallel == pytest.approx(1, abs=1e-6)


def test_activations_without_an_edge_say_so():
    with pytest.raises(ValueError, match=r"sigma_b=0\.3"):
        meanfield.critical_sigma_w("relu", 0.3)
    with pytest.raises(ValueError, match="exactly one"):
        meanfield.critical_points("tanh")
    assert meanfield.critical_points("relu", sigma_b=0.3) == ()


@pytest.mark.parametrize(("g", "largest", "mean"), [(2.0, 0.1547242298, -1.149), (4.0, 0.4329, -3.551)])
def test_recurrent_exponents_of_tanh(g: float, largest: float, mean: float):
    found = meanfield.recurrent_exponents("tanh", g)
    assert found.largest == pytest.approx(largest, abs=5e-5 if g == 4 else 1e-10)
    assert found.mean == pytest.approx(mean, abs=5e-4)


def test_largest_recurrent_exponent_of_a_drawn_network():
    rng = np.random.default_rng(0)
    n, g, steps = 400, 2.0, 3000
    weights = g * rng.standard_normal((n, n)) / n**0.5
    x, tangent, logs = rng.standard_normal(n), rng.standard_normal(n), []
    for _ in range(steps):
        tangent = weights @ (tangent * (1 - np.tanh(x) ** 2))
        x = weights @ np.tanh(x)
        size = np.linalg.norm(tangent)
        tangent /= size
        logs.append(math.log(size))
    # the bias of finite width is negative
    assert np.mean(logs[300:]) == pytest.approx(meanfield.recurrent_exponents("tanh", g).largest, abs=0.012)
