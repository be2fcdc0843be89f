"""Networks of coordinates are told that their targets vary fast where Fourier features learn far more of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, apply, examine
from stabkit.errors import ArgumentError

X = torch.linspace(-1, 1, 80)[:, None]


def network(inputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


def said(model: nn.Module, targets: Tensor, x: Tensor = X) -> list[Finding]:
    found = examine(stabkit.trace(model, x), lambda out: functional.mse_loss(out, targets)).findings
    return [f for f in found if f.kind == "spectral_bias"]


def test_fast_targets_are_told_and_learnt_with_features() -> None:
    model = network()
    (found,) = said(model, torch.sin(25 * X))
    assert found.severity == "warning"
    assert found.numbers["learnt_with_features"] > 0.8 > 0.5 > found.numbers["learnt"]
    apply(model, found)
    assert model(X).shape == (80, 1)
    assert said(model, torch.sin(25 * X)) == []


@pytest.mark.parametrize(
    "targets",
    [torch.sin(2 * X), X.abs(), torch.randn(80, 1, generator=torch.Generator().manual_seed(1))],
    ids=["slow", "a kink", "noise"],
)
def test_slow_targets_and_noise_raise_nothing(targets: Tensor) -> None:
    assert said(network(), targets) == []


def test_features_of_a_table_are_no_coordinates() -> None:
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    assert said(network(6), torch.sin(25 * x[:, :1]), x) == []


def test_features_are_given_to_a_linear_layer() -> None:
    with pytest.raises(ArgumentError, match="Fourier features are given"):
        apply(network(), Finding("spectral_bias", "warning", (0,), "1", 1.0, "", "", "", {}, (
            {"action": "fourier_features", "module": "1", "frequency": 2.0},
        )))  # fmt: skip


def test_one_number_for_each_point_in_one_axis():
    """Targets without a second axis, as of a model that squeezes its output."""
    x = torch.linspace(-1, 1, 64)[:, None]
    targets = x[:, 0] ** 2
    model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))
    found = stabkit.diagnose(stabkit.trace(model, x), lambda out: (out - targets).square().mean())
    assert not [f for f in found if "Fourier" in f.remedy]
