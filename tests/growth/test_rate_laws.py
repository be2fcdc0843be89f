from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.growth import gradient_profile, rate_law
from tests.growth.systems import DOUBLE

DEPTH = np.arange(65, dtype=float)
NOISE = 0.02 * np.random.default_rng(0).standard_normal(65)


@pytest.mark.parametrize(
    ("logs", "law"),
    [
        (0.2 * DEPTH, "exponential"),
        (-0.2 * DEPTH + NOISE, "exponential"),
        (-2 * np.log(DEPTH + 1) + NOISE, "power"),
        (0.7 * np.sqrt(DEPTH) + NOISE, "square root"),
        (3 + NOISE, "constant"),
    ],
)
def test_each_law_is_told_from_the_others(logs, law):
    assert rate_law(logs).law == law


def test_a_short_run_leaves_it_undecided():
    logs = 0.2 * DEPTH[:8] + 0.25 * np.random.default_rng(1).standard_normal(8)
    found = rate_law(logs)
    assert found.margin < 10
    assert found.law != "exponential"


def test_fits_are_those_of_numpy():
    found = rate_law(-0.2 * DEPTH + NOISE)
    slope, _ = np.polyfit(DEPTH, -0.2 * DEPTH + NOISE, 1)
    assert math.isclose(found.rate, slope, rel_tol=1e-9)
    residual = float(np.polyfit(DEPTH, -0.2 * DEPTH + NOISE, 1, full=True)[1][0])
    n, p = 65, 3
    assert math.isclose(found.aic["exponential"], n * math.log(residual / n) + 2 * p + 2 * p * (p + 1) / (n - p - 1))


class NormalisedBlock(nn.Module):
    """x + f(x) with two pairs of batch norm and ReLU in f."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            linear = nn.Linear(width, width, bias=False)
            nn.init.normal_(linear.weight, std=math.sqrt(1 / width))
            layers += [nn.BatchNorm1d(width, eps=1e-12, dtype=DOUBLE), nn.ReLU(), linear.double()]
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_normalised_residual_network_follows_a_power_law():
    torch.manual_seed(0)
    model = nn.Sequential(*[NormalisedBlock(64) for _ in range(48)])
    flow = stabkit.trace(model, torch.randn(64, 64, dtype=DOUBLE), batch_dim=None, check=False)
    found = rate_law(gradient_profile(flow).log_gradient_norms)
    assert found.law == "power"
    assert found.margin < -10
    assert -1.6 < found.exponent < -0.7  # half of (pi / (pi - 1))^2 = 2.15 for squares


@pytest.mark.parametrize(("logs", "message"), [(np.zeros(3), "7 states"), (np.full(9, -np.inf), "not finite")])
def test_what_cannot_be_fitted_is_an_error(logs, message):
    with pytest.raises(ValueError, match=message):
        rate_law(logs)
