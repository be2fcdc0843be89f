"""Two states at two rates: an inner loop refines one of them with the other held, which an outer loop then renews."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x))


class _Map(nn.Module):
    """One map for both states, applied to the sum of a state and what is injected."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, x: Tensor, injected: Tensor) -> Tensor:
        x = x + injected
        for layer in self.layers:
            x = layer(x)
        return x


class _TwoRates(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.map, self.inner, self.outer = _Map(), inner, outer
        self.register_buffer("slow", torch.randn(6))
        self.register_buffer("fast", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = self.slow.expand_as(x), self.fast.expand_as(x)
        for _ in range(self.outer):
            for _ in range(self.inner):
                fast = self.map(fast, slow + x)
            slow = self.map(slow, fast)
        return slow


@pytest.mark.parametrize(("inner", "outer"), [(4, 2), (5, 2)])
def test_rounds_of_an_inner_loop_are_steps_in_every_cycle(inner: int, outer: int) -> None:
    """The layers are projected Euler steps; rounds of a map have no step of their own, and no cycle is one lump."""
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(_TwoRates(inner, outer), torch.randn(3, 6)))
    assert not any(record.name == "transformed skip" for record in found)
    layers = [record for record in found if record.name.startswith("projected Euler")]
    assert len(layers) >= 2 * (inner - 1) * (outer - 1)
    assert any("input injection" in note for record in found for note in record.notes)
