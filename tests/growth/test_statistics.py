from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import stabkit
from stabkit.growth import gradient_profile, over_samples, over_seeds
from tests.growth.systems import DOUBLE, normal


def test_the_interval_over_samples_is_that_of_scipy():
    values = np.random.default_rng(0).standard_normal(60)
    found = over_samples(values)
    other = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert abs(float(found.low) - other.low) < 0.03
    assert abs(float(found.high) - other.high) < 0.03


def test_intervals_over_seeds_cover_what_samples_of_one_network_do_not():
    def measure(seed: int) -> torch.Tensor:
        shared = float(normal(1, seed=seed)[0])
        return shared + 0.01 * normal(50, seed=100 + seed)

    seeds = over_seeds(measure, range(12), resamples=500)
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
