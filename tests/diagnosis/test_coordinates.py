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


def tanh_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


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


class Sine(nn.Module):
    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)


def sines(omega: float) -> nn.Sequential:
    """A network of sines, with the initialisation of SIREN."""
    torch.manual_seed(0)
    layers = [nn.Linear(1, 32), Sine(omega), nn.Linear(32, 32), Sine(omega), nn.Linear(32, 1)]
    for layer in layers[2::2]:
        nn.init.uniform_(layer.weight, -((6 / 32) ** 0.5) / omega, (6 / 32) ** 0.5 / omega)
    return nn.Sequential(*layers)


def trained(model: nn.Module, targets: Tensor, steps: int, rate: float = 5e-3) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.mse_loss(model(X), targets).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("model", "targets", "steps", "rate"),
    [
        (tanh_network(), torch.sin(3 * X) + X / 2, 500, 5e-3),
        (network(), 4 * X.abs() + 7, 500, 5e-3),
        (sines(30.0), torch.sin(25 * X), 200, 1e-3),
        (nn.Sequential(*sines(30.0), nn.Softplus()), 2 + torch.sin(9 * X.square()), 200, 1e-3),
    ],
    ids=["smooth", "a kink", "sines", "sines, positive"],
)
def test_of_what_a_trained_network_leaves_no_feature_is_worth_a_warning(
    model: nn.Module, targets: Tensor, steps: int, rate: float
) -> None:
    trained(model, targets, steps, rate)
    assert functional.mse_loss(model(X), targets) < 0.1 * targets.var()
    assert said(model, targets) == []


def test_a_network_that_has_learnt_little_of_fast_targets_is_told_what_it_leaves() -> None:
    model, targets = network(), torch.sin(25 * X)
    trained(model, targets, 60)
    (found,) = said(model, targets)
    assert 0.3 < found.numbers["left"] < 1.1
    assert "where these are 0.02" in found.evidence
    assert "as SIREN does" in found.remedy


def test_a_network_of_sines_is_not_told_to_take_sines() -> None:
    (found,) = said(sines(1.0), torch.sin(25 * X))
    assert "Fourier features" in found.remedy
    assert "SIREN" not in found.remedy


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
