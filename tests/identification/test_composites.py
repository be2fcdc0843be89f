"""Fields that are composed of several stages, and evaluated as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.tracing import trace

D = 8


class Layer(nn.Module):
    """A pre-norm layer without its skip: a(x) + m(x + a(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.mixer = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.mixer(self.norms[0](x)))
        return a + self.mlp(self.norms[1](x + a))


class Scheme(nn.Module):
    """Layers under an integrator that is written as a function, not as a module."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.layers, self.scheme = nn.ModuleList(Layer() for _ in range(4)), scheme

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for layer in self.layers:
            before, x = self.step(layer, before, x)
        return x

    def step(self, f: Layer, before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.scheme == "leapfrog":
            return x, x + (x - before) + 0.09 * f(x)
        if self.scheme == "two-step":
            return x, torch.lerp(x, before, -0.3).add(f(x))
        k1 = f.forward(x)
        if self.scheme == "midpoint":
            return x, x + 0.5 * f.forward(x + 0.25 * k1)
        k2 = f.forward(torch.add(x, k1, alpha=0.5))
        k3 = f.forward(torch.add(x, k2, alpha=0.5))
        return x, x + torch.stack([k1, 2 * k2, 2 * k3, f.forward(x + k3)]).sum(0) / 6


@pytest.mark.parametrize(
    ("scheme", "name", "h"),
    [
        ("leapfrog", "second_order_leapfrog", 0.3),
        ("two-step", "two-step (LM-ResNet, k = -0.3)", 1.0),
        ("midpoint", "midpoint", 0.5),
        ("rk4", "rk4", 1.0),
    ],
)
def test_a_layer_without_its_skip_is_one_field(scheme, name, h):
    torch.manual_seed(0)
    flow = trace(Scheme(scheme).double(), torch.randn(2, 3, D, dtype=torch.float64))
    found = identify(flow)[1]
    assert (found.name, found.evidence) == (name, "proven")
    assert found.step_size == pytest.approx(h)


def test_two_sums_of_different_fields_stay_a_splitting():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)

    flow = trace(nn.Sequential(Block(), Block(), Block()).double(), torch.randn(2, 3, D, dtype=torch.float64))
    assert identify(flow)[1].name == "Lie splitting (2 Euler steps)"
