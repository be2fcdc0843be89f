from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit import meanfield


@pytest.mark.parametrize(("depth", "sigma_w", "log_ratio"), [(100, 1.0, 10.55), (200, 1.0, 15.17), (100, 2.0, 18.58)])
def test_tanh_residual_gradients_follow_the_root_of_depth(depth: int, sigma_w: float, log_ratio: float):
    profile = meanfield.residual_profile("tanh", depth, sigma_w=sigma_w, branch="phi(W x)")
    assert profile.log_gradient_ratio == pytest.approx(log_ratio, abs=5e-3)


def test_tanh_residual_gradients_have_the_slope_of_the_limit():
    slope = 8 / 3 / math.sqrt(2 * math.pi)
    logs = [
        meanfield.residual_profile("tanh", depth, sigma_w=1.0, branch="phi(W x)").log_gradient_ratio
        for depth in (100, 900)
    ]
    assert (logs[1] - logs[0]) / (math.sqrt(900) - math.sqrt(100)) == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize(("b", "depth", "growth"), [(0.5, 400, 1.648), (0.25, 100, 131.5), (1.0, 400, 1.00125)])
def test_scaled_relu_branches(b: float, depth: int, growth: float):
    profile = meanfield.residual_profile("relu", depth, sigma_w=1.0, scale=depth**-b)
    assert profile.q[-1] == pytest.approx((1 + depth ** (-2 * b) / 2) ** depth, rel=1e-10)
    assert profile.q[-1] == pytest.approx(growth, rel=1e-3)
    np.testing.assert_allclose(profile.log_chi, np.log(1 + depth ** (-2 * b) / 2))


def test_unscaled_and_scaled_he_branches():
    plain = meanfield.residual_profile("relu", 12, sigma_w=2**0.5)
    assert math.exp(plain.log_gradient_ratio) == pytest.approx(4096)
    scaled = meanfield.residual_profile("relu", 50, sigma_w=2**0.5, scale=50**-0.5)
    assert math.exp(scaled.log_gradient_ratio) == pytest.approx(2.692, abs=5e-4)
    off = meanfield.residual_profile("relu", 50, sigma_w=2**0.5, scale=0.0)
    assert off.log_gradient_ratio == 0
    np.testing.assert_allclose(plain.log_chi_relative, 0, atol=1e-12)


def test_units_of_uncentred_branches_agree_with_a_drawn_network():
    rng = np.random.default_rng(0)
    n, depth = 1000, 8
    x = rng.standard_normal((n, 2)) @ np.linalg.cholesky([[1, 0.3], [0.3, 1]]).T
    for _ in range(depth):
        x = 0.9 * x + 0.5 * np.maximum(rng.standard_normal((n, n)) @ x / n**0.5, 0)
    profile = meanfield.residual_profile("relu", depth, sigma_w=1.0, skip=0.9, scale=0.5, branch="phi(W x)", c=0.3)
    assert profile.c is not None
    assert np.mean(x**2) == pytest.approx(profile.q[-1], rel=0.1)
    found = np.mean(x[:, 0] * x[:, 1]) / np.sqrt(np.mean(x[:, 0] ** 2) * np.mean(x[:, 1] ** 2))
    assert found == pytest.approx(profile.c[-1], abs=0.05)


def test_unknown_branches_are_refused():
    with pytest.raises(ValueError, match="'W phi"):
        meanfield.residual_profile("relu", 3, sigma_w=1.0, branch="post")
    with pytest.raises(ValueError, match="depth=0"):
        meanfield.residual_profile("relu", 0, sigma_w=1.0)
