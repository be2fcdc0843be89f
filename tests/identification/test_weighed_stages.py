"""Stages of a method that gates weigh, beside experts and gated units, which are fields."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification.record import Identification


class _Field(nn.Module):
    """The increment of two sub-layers, the second at what the first leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.f = nn.Linear(6, 6)
        self.g = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def increment(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.f(self.n1(x)))
        return a + self.g(self.n2(x + a))


class _Gated(_Field):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.gate = how, nn.Linear(12 if how != "softmax" else 18, 6 if how != "softmax" else 3)
        if how == "zero":
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        k = [self.increment(x)]
        k.append(self.increment(x + k[0]))
        if self.how == "softmax":
            k.append(self.increment(x + k[1] / 2))
            w = torch.softmax(self.gate(torch.cat(k, -1)), -1)
            return x + sum((w[..., i : i + 1] * stage for i, stage in enumerate(k)), torch.zeros(()))
        g = torch.sigmoid(self.gate(torch.cat(k, -1)))
        return x + torch.lerp(k[1], k[0], g) if self.how == "lerp" else x + g * k[0] + (1 - g) * k[1]


class _Fields(_Field):
    """A mixture of experts, a gated unit, and two layers that a gate mixes inside of a branch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.gate, self.out = how, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, weight = torch.tanh(self.f(x)), torch.sigmoid(self.gate(x))
        if self.how == "experts":
            return x + weight * first + (1 - weight) * self.g(x)
        if self.how == "unit":
            return x + weight * self.f(x)
        return x + self.out(weight * first + (1 - weight) * self.g(first))


def _middle(block: type[nn.Module], how: str) -> Identification:
    torch.manual_seed(0)
    model = nn.Sequential(*(block(how) for _ in range(3)))
    return next(r for r in stabkit.identify(stabkit.trace(model, torch.randn(3, 6))) if 1 in r.steps)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("sigmoid", "gated RK2 (2 stages, weights g(x) and 1 - g(x))"),
        ("lerp", "gated RK2 (2 stages, weights g(x) and 1 - g(x))"),
        ("zero", "gated RK2 (2 stages, weights g(x) and 1 - g(x))"),
        ("softmax", "gated Runge-Kutta (3 stages, weighed by gates, weights that sum to one)"),
    ],
)
def test_stages_that_gates_weigh(how: str, name: str) -> None:
    """Also where the mean of the gates makes the numbers of Heun's method; the order is that of any weights."""
    found = _middle(_Gated, how)
    assert (found.name, found.evidence, found.skip) == (name, "measured", 1.0)
    assert found.step_size == pytest.approx(1.0)
    assert "of order 1" in found.system


@pytest.mark.parametrize("how", ["experts", "unit", "inside"])
def test_gates_inside_of_fields_weigh_no_stages(how: str) -> None:
    """Experts at one point, a gated linear unit and a mixture inside of a branch are Euler steps of one field."""
    found = _middle(_Fields, how)
    assert found.name in ("forward Euler", "forward Euler, parallel branches")
    assert (found.evidence, found.step_size) == ("proven", 1.0)
