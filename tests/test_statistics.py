"""Intervals hold what they claim, and the error of a time series is that of its mean."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn

import stabkit
from stabkit.errors import StabkitError
from stabkit.growth import gradient_profile, over_samples, over_seeds
from stabkit.statistics import (
    confidence_above,
    interval_of_mean,
    jackknife_reach,
    mean_interval,
    series_error,
    student_factor,
)
from tests.growth.systems import DOUBLE, normal

KINDS = {"normal": None, "log chi2, 1 degree": 1, "log chi2, 2 degrees": 2, "log chi2, 8 degrees": 8}


def drawn(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values of mean 0."""
    degrees = KINDS[kind]
    if degrees is None:
        return rng.standard_normal(shape)
    return np.log(rng.chisquare(degrees, shape)) - scipy.special.digamma(degrees / 2) - math.log(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 4, 5, 8, 16, 32])
def test_intervals_called_95_percent_hold_93_to_97(kind: str, count: int):
    found = over_samples(drawn(kind, (count, 40_000), np.random.default_rng(count)))
    assert 0.93 <= ((found.low <= 0) & (found.high >= 0)).mean() <= 0.97


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeds", [3, 5, 8, 16])
def test_intervals_over_seeds_hold_93_to_97(kind: str, seeds: int):
    rng = np.random.default_rng(seeds)
    shared, own = drawn(kind, (seeds, 1, 40_000), rng), drawn(kind, (seeds, 4, 40_000), rng)
    found = over_seeds(lambda seed: shared[seed] + 0.3 * own[seed], range(seeds))
    assert 0.93 <= ((found.low <= 0) & (found.high >= 0)).mean() <= 0.97


def autoregressive(rho: float, steps: int, runs: int) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((steps, runs))
    series = np.empty_like(noise)
    series[0] = noise[0] / math.sqrt(1 - rho**2)
    for t in range(1, steps):
        series[t] = rho * series[t - 1] + noise[t]
    return series


def logistic(steps: int, runs: int) -> np.ndarray:
    """Growth less its mean log 2, of x -> 4 x (1 - x), whose invariant measure is the arcsine law."""
    rng = np.random.default_rng(0)
    x, rows = rng.beta(0.5, 0.5, runs), []
    for _ in range(steps):
        rows.append(np.log(np.abs(4 - 8 * x).clip(min=1e-300)) - math.log(2))
        x = (4 * x * (1 - x) + 1e-15 * rng.standard_normal(runs)).clip(1e-16, 1 - 1e-16)
    return np.stack(rows)


SERIES = {f"AR(1) {rho}": partial(autoregressive, rho) for rho in (0, 0.9, 0.98, -0.8)}


@pytest.mark.parametrize("steps", [1000, 4000])
@pytest.mark.parametrize("made", [*SERIES.values(), logistic], ids=[*SERIES, "logistic map"])
def test_the_mean_of_a_series_lies_within_1_96_standard_errors_in_93_to_97_percent(made, steps: int):
    series = made(steps, 1000)
    inside = np.abs(series.mean(axis=0)) <= 1.96 * series_error(series)
    assert 0.93 <= inside.mean() <= 0.97


def test_the_error_of_white_noise_is_the_usual_one_and_of_a_constant_none():
    noise = np.random.default_rng(1).standard_normal((500, 3, 2))
    usual = noise.std(axis=0, ddof=1) / math.sqrt(500)
    assert series_error(noise).shape == (3, 2)
    assert np.median(series_error(noise) / usual) == pytest.approx(1, abs=0.1)
    assert series_error(np.full((50, 2), 0.3)).max() < 1e-15
    assert np.isnan(series_error(np.ones((1, 2)))).all()


def test_many_columns_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch):
    noise = np.random.default_rng(2).standard_normal((100, 7))
    whole = series_error(noise)
    monkeypatch.setattr("stabkit.statistics._CHUNK", 200)
    np.testing.assert_allclose(series_error(noise), whole)


def test_the_factor_is_a_quantile_of_student_and_falls_to_that_of_the_normal():
    assert student_factor(5, 0.9) == pytest.approx(scipy.stats.t.ppf(1 - 0.72 * 0.05, 4))
    assert student_factor(10**7) == pytest.approx(scipy.stats.norm.ppf(1 - 0.72 * 0.025), abs=1e-5)
    assert student_factor(1) == math.inf
    for error in (0.5, 0.05, 0.002, 1e-6):
        for count in (2, 3, 4, 7, 32, 201, 1001, 1002):
            exact = scipy.special.stdtrit(count - 1, 1 - 0.72 * error / 2)
            assert student_factor(count, 1 - error) == pytest.approx(exact, rel=1e-12)
    with pytest.raises(StabkitError, match=r"confidence=1\.5"):
        student_factor(3, 1.5)


def test_one_value_is_its_own_interval():
    assert mean_interval(np.array([3.0])) == (3.0, 3.0)
    low, high = interval_of_mean(torch.tensor([[1.0, 2.0]]))
    assert low.tolist() == high.tolist() == [1.0, 2.0]


def test_the_confidence_that_a_mean_lies_above_a_limit():
    values = np.array([1.0, 2.0, 3.0])
    assert confidence_above(values, 2.0) == pytest.approx(0.5)
    assert confidence_above(values, 1.0) == pytest.approx(1 - scipy.stats.ttest_1samp(values, 1.0).pvalue / 2)
    assert (confidence_above(np.array([2.0]), 1.0), confidence_above(np.array([2.0, 2.0]), 3.0)) == (1.0, 0.0)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(3).standard_normal(12)
    left_out = np.array([np.delete(values, i).mean() for i in range(12)])
    assert jackknife_reach(left_out) == pytest.approx(student_factor(12) * values.std(ddof=1) / math.sqrt(12))
    assert jackknife_reach(left_out[:1]) == 0


def test_intervals_over_seeds_cover_what_samples_of_one_network_do_not():
    def measure(seed: int) -> torch.Tensor:
        shared = float(normal(1, seed=seed)[0])
        return shared + 0.01 * normal(50, seed=100 + seed)

    seeds = over_seeds(measure, range(12))
    samples = over_samples(measure(0))
    assert float(seeds.high - seeds.low) > 20 * float(samples.high - samples.low)
    assert seeds.low < 0 < seeds.high
    assert (seeds.scope, samples.scope) == ("seeds and samples", "samples of this network")
    assert seeds.seeds == tuple(range(12))


def test_a_factory_of_relu_networks_shrinks_as_the_theory_of_finite_width_says():
    def measure(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        layers = [nn.Linear(32, 32, bias=False) for _ in range(12)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        model = nn.Sequential(*[nn.Sequential(layer, nn.ReLU()) for layer in layers]).double()
        flow = stabkit.trace(model, torch.randn(4, 32, dtype=DOUBLE), check=False)
        return gradient_profile(flow).total_growth / 12

    found = over_seeds(measure, range(20), confidence=0.99)
    assert found.low < -0.0412701040 < found.high


def test_too_little_to_speak_of():
    with pytest.raises(ValueError, match="at least 2"):
        over_samples(np.ones(1))
    with pytest.raises(ValueError, match="at least 2"):
        over_seeds(lambda seed: np.ones(3), [0])
