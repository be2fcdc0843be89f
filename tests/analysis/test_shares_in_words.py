"""What is said of the growth that eigenvalues predict where only bounds on them are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stabkit
from stabkit.analysis.explanation import _predicted


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (None, "no eigenvalues were computed"),
        ((0.5, 0.51), "eigenvalues predict 50% of the growth"),
        ((0.2, 1.1), "eigenvalues predict 20% to 110% of the growth, by bounds on those not computed"),
        ((0.64, math.inf), "eigenvalues predict at least 64% of the growth, by bounds on those not computed"),
        ((-math.inf, 0.9), "eigenvalues predict at most 90% of the growth, by bounds on those not computed"),
        ((-math.inf, math.inf), "eigenvalues were not computed, and bounds on them say nothing"),
    ],
)
def test_bounds_are_told_as_bounds(share, words):
    assert _predicted(share) == words


class Wide(nn.Module):
    """Damped oscillators that are too large for a dense spectrum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(600, 600) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = 0.4 * x + 0.1 * torch.tanh(layer(x))
        return x


def test_the_share_of_a_small_and_of_a_large_model():
    report = stabkit.analyze(Wide(), torch.randn(2, 600), loss=lambda out: out.square().mean())
    assert "by bounds on those not computed" in report.explained["why"]
    torch.manual_seed(0)
    small = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(8)])
    why = stabkit.analyze(small, torch.randn(4, 16), loss=lambda out: out.square().mean()).explained["why"]
    assert "bounds" not in why
    assert "eigenvalues predict" in why
