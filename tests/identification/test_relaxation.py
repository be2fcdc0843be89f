from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn

import stabkit


class Relaxing(nn.Module):
    """dx/dt = g(x) - c x."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.g, self.c = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), c

    def forward(self, t, x):
        return self.g(x) - self.c * x


class Solved(nn.Module):
    def __init__(self, field: nn.Module, method: str) -> None:
        super().__init__()
        self.field, self.method = field, method

    def forward(self, x):
        return torchdiffeq.odeint(self.field, x, torch.linspace(0, 0.9, 4, dtype=x.dtype), method=self.method)[-1]


@pytest.mark.parametrize("c", [1.0, -0.5])
@pytest.mark.parametrize(("method", "name"), [("midpoint", "midpoint"), ("rk4", "three_eighths"), ("heun3", "heun3")])
def test_a_linear_part_of_the_field_does_not_hide_the_method(method: str, name: str, c: float):
    torch.manual_seed(0)
    flow = stabkit.trace(Solved(Relaxing(c), method).double(), torch.randn(2, 4, dtype=torch.float64))
    found = stabkit.identify(flow)[:3]
    assert [record.name for record in found] == [name] * 3
    assert [record.step_size for record in found] == pytest.approx([0.3] * 3)
    assert [record.skip for record in found] == [1.0] * 3
    assert f"{c:.4g} x" in found[0].notes[0]


def test_without_a_linear_part_nothing_is_said_about_one():
    torch.manual_seed(0)
    flow = stabkit.trace(Solved(Relaxing(0.0), "midpoint").double(), torch.randn(2, 4, dtype=torch.float64))
    assert not any("linear part" in note for record in stabkit.identify(flow) for note in record.notes)
