from __future__ import annotations

import numpy as np
import pytest

from stabkit.meanfield.rates import fit_rate


def profile(logs: np.ndarray, noise: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.exp(logs[None, :, None] + noise * rng.standard_normal((1, len(logs), 32)))


def test_an_exponential_is_told_from_a_power():
    depth = np.arange(1, 41)
    found = fit_rate(profile(-0.1 * depth), 0)
    assert found.law == "exponential"
    assert found.chi == pytest.approx(np.exp(0.1), rel=1e-3)
    assert found.interval[0] < np.exp(0.1) < found.interval[1]
    assert found.depth_scale == pytest.approx(10, rel=0.01)
    found = fit_rate(profile(-2.15 * np.log(depth)), 0)
    assert found.law == "power"
    assert found.exponent == pytest.approx(2.15, rel=0.01)


def test_short_profiles_are_undecided():
    assert fit_rate(profile(-0.02 * np.arange(1, 5), 0.1), 2).law == "undecided"
    with pytest.raises(ValueError, match="3 states"):
        fit_rate(profile(np.zeros(3)), 0)
