from __future__ import annotations

import math

import torch

from stabkit.growth.lyapunov import autocorrelation_times, halves, has_converged, standard_errors
from tests.growth.systems import DOUBLE, normal


def test_errors_of_an_autoregressive_process_are_those_of_its_spectrum_at_zero():
    noise, a = normal(4000, 40), 0.8
    series = torch.empty_like(noise)
    series[0] = noise[0] / math.sqrt(1 - a * a)
    for t in range(1, len(noise)):
        series[t] = a * series[t - 1] + noise[t]
    errors = standard_errors(series)
    exact = 1 / (1 - a) / math.sqrt(len(noise))
    assert abs(float(errors.square().mean().sqrt()) / exact - 1) < 0.15
    assert abs(float(series.mean(0).std()) / exact - 1) < 0.3
    times = autocorrelation_times(series, errors)
    assert abs(float(times.mean()) / ((1 + a) / (1 - a)) - 1) < 0.3


def test_a_constant_series_has_no_error_and_converges():
    series = torch.full((50, 2), 0.3, dtype=DOUBLE)
    errors = standard_errors(series)
    assert errors.max() < 1e-15
    assert has_converged(series.mean(0), errors, halves(series), 50, 1e-3, 0.05).all()


def test_a_trend_a_short_run_and_a_wide_error_have_not_converged():
    trend = torch.linspace(0, 1, 1000, dtype=DOUBLE).unsqueeze(1)
    assert not has_converged(trend.mean(0), standard_errors(trend) * 0 + 1e-6, halves(trend), 1000, 1e-3, 0.05).any()
    steady = torch.full((10, 1), 1.0, dtype=DOUBLE)
    assert not has_converged(steady.mean(0), standard_errors(steady), halves(steady), 10, 1e-3, 0.05).any()
    noisy = normal(100, 1)
    assert not has_converged(noisy.mean(0), standard_errors(noisy), halves(noisy), 100, 1e-3, 0.05).any()
