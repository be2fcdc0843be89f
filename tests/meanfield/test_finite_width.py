from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit import meanfield


def test_typical_relu_gain():
    assert meanfield.relu_log_gain(32).mean / 2 == pytest.approx(-0.0412701040, abs=1e-10)
    wide = meanfield.relu_log_gain(2000)
    assert wide.mean == pytest.approx(-5 / 4000, rel=0.01)
    assert wide.variance == pytest.approx(5 / 2000, rel=0.01)
    assert meanfield.log_gain_variance("relu", 2000) == pytest.approx(5 / 2000)
    assert meanfield.log_gain_variance("linear", 2000) == pytest.approx(2 / 2000)
    assert meanfield.log_gain_variance("linear", 2000, weights="orthogonal") == 0


def test_relu_gain_of_drawn_layers():
    rng = np.random.default_rng(0)
    n, draws = 24, 4000
    u = np.full(n, n**-0.5)
    masks = rng.random((draws, n)) < 0.5
    logs = np.log(np.sum(masks * (rng.standard_normal((draws, n, n)) @ u) ** 2, axis=1) * 2 / n)
    found = meanfield.relu_log_gain(n)
    assert logs.mean() == pytest.approx(found.mean, abs=4 * math.sqrt(found.variance / draws))
    assert logs.var() == pytest.approx(found.variance, rel=0.15)


def test_gaussian_exponents():
    found = meanfield.gaussian_exponents(8)
    assert found[[0, -1]] == pytest.approx([-0.065088, -1.674902], abs=1e-6)
    wide = meanfield.gaussian_exponents(20)
    assert (wide[0], wide[-1], wide.mean()) == pytest.approx((-0.02542, -2.1330, -0.5409), abs=5e-5)


def test_gaussian_exponents_of_drawn_products():
    rng = np.random.default_rng(0)
    n, steps = 10, 4000
    frame, logs = np.eye(n), np.zeros((steps, n))
    for i in range(steps):
        frame, triangle = np.linalg.qr(rng.standard_normal((n, n)) / n**0.5 @ frame)
        logs[i] = np.log(np.abs(np.diag(triangle)))
    errors = logs.std(axis=0) / steps**0.5
    assert np.all(np.abs(logs.mean(axis=0) - meanfield.gaussian_exponents(n)) < 4 * errors)


def test_residual_exponent_of_linear_layers():
    assert meanfield.residual_exponent(32, 0.5) == pytest.approx(0.1058913889, abs=1e-10)
    assert meanfield.residual_exponent(None, 0.5) == pytest.approx(0.5 * math.log(1.25))
    assert meanfield.residual_exponent(100_000, 0.5) == pytest.approx(0.5 * math.log(1.25), abs=1e-5)
    assert meanfield.residual_exponent(32, 0.0) == 0


def test_widths_out_of_range_are_refused():
    with pytest.raises(ValueError, match="width=0"):
        meanfield.gaussian_exponents(0)
    with pytest.raises(ValueError, match="sigma_w=-1"):
        meanfield.relu_log_gain(8, -1.0)
