"""One step that is taken again and again and settles is no network whose gradient vanishes by fault."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import examine
from tests.diagnosis.confusion import serious


class Memory(nn.Module):
    """A field with two attractors a coordinate, iterated; perhaps behind an encoder that learns."""

    def __init__(self, gain: float, encoder: bool = False, steps: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(8, 8) if encoder else nn.Identity()
        self.field, self.head, self.steps = nn.Linear(8, 8, bias=False), nn.Linear(8, 2), steps
        self.field.weight.data.copy_(gain * torch.eye(8))

    def forward(self, z: Tensor) -> Tensor:
        z = self.encoder(z)
        for _ in range(self.steps):
            z = torch.tanh(self.field(z))
        return self.head(z)


class Equilibrium(nn.Module):
    """A field that reads the input at each step, iterated to its fixed point."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.field, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.field.weight.data.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(24):
            z = torch.tanh(self.field(z) + x)
        return self.head(z)


@pytest.mark.parametrize("model", [Memory(3.0), Equilibrium()])
def test_a_field_that_settles_is_wanted(model):
    found = examine(stabkit.trace(model, torch.randn(4, 8), check=False))
    assert found.verdict.name == "stable"
    assert not serious(found)


def test_it_says_that_it_settles():
    found = examine(stabkit.trace(Memory(3.0), torch.randn(4, 8), check=False))
    assert "settles at a fixed point" in found.verdict.summary


def test_an_encoder_before_it_gets_no_gradient():
    found = examine(stabkit.trace(Memory(3.0, encoder=True), torch.randn(4, 8), check=False))
    assert found.verdict.name == "vanishing"
    assert serious(found)


def test_a_signal_that_dies_has_not_settled():
    found = examine(stabkit.trace(Memory(0.4), torch.randn(4, 8), check=False))
    assert found.verdict.name == "vanishing"
