"""Last layers that begin small on purpose: of policies, values and detectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import examine, treat
from stabkit.diagnosis.finding import serious


def mlp(given: int, made: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(given, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, made))


def test_a_policy_that_begins_near_chance_keeps_its_last_layer():
    model = mlp(4, 2)
    nn.init.orthogonal_(model[-1].weight, 0.01)
    nn.init.zeros_(model[-1].bias)
    x = torch.randn(256, 4)
    actions = torch.randint(0, 2, (256,))
    old = functional.log_softmax(model(x).detach(), 1).gather(1, actions[:, None])[:, 0]
    rewards = (x[:, 2] + 0.5 * x[:, 3]) * (2.0 * actions - 1) + 0.5 * torch.randn(256)
    advantages = (rewards - rewards.mean()) / rewards.std()

    def loss(out: Tensor) -> Tensor:
        ratio = (functional.log_softmax(out, 1).gather(1, actions[:, None])[:, 0] - old).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    found = examine(stabkit.trace(model, x), loss)
    assert [f for f in found.findings if serious(f)] == []
    assert found.verdict.name == "stable"
    assert "but for" not in found.verdict.summary
    assert treat(model, x, loss=loss).applied == ()


@pytest.mark.parametrize("deviation", [0.01, 0.003, 0.001])
def test_a_value_that_begins_near_zero_keeps_its_last_layer(deviation: float):
    model = mlp(6, 1)
    nn.init.normal_(model[-1].weight, 0.0, deviation)
    x = torch.randn(128, 6)
    values = (x[:, :1] * x[:, 1:2]).tanh()
    found = examine(stabkit.trace(model, x), lambda out: functional.mse_loss(out, values))
    assert [f for f in found.findings if serious(f)] == []


def test_a_detector_that_begins_undecided_keeps_its_last_layer():
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *layers, nn.Conv2d(16, 4, 3, padding=1))
    nn.init.normal_(model[-1].weight, 0.0, 0.001)
    x = torch.randn(8, 3, 12, 12)
    labels = (x[:, :1] > 1).float().expand(-1, 4, -1, -1)
    loss = functional.binary_cross_entropy_with_logits
    found = examine(stabkit.trace(model, x), lambda out: loss(out, labels))
    assert [f for f in found.findings if serious(f)] == []
