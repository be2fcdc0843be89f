from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabkit.errors import TraceError
from stabkit.identification.evidence.continuous_limit import continuous_limit
from stabkit.tracing import trace

from .transformer_models import pre_norm


class Layer(nn.Module):
    """x + size W tanh(x)."""

    def __init__(self, weight: torch.Tensor, size: float) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(weight), size

    def forward(self, x):
        return x + self.size * torch.tanh(x) @ self.weight.T


def network(depth: int, size: float, *, smooth: bool, width: int = 100) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = (torch.randn(width, width, dtype=torch.float64) / math.sqrt(width) for _ in range(2))
    weights = []
    for layer in range(depth):
        t = layer / depth
        independent = torch.randn(width, width, dtype=torch.float64) / math.sqrt(width)
        weights.append(math.cos(t) * first + math.sin(t) * last if smooth else independent)
    return nn.Sequential(*(Layer(w, size) for w in weights))


def measured(model, width=100):
    torch.manual_seed(1)
    return continuous_limit(trace(model, torch.randn(4, width, dtype=torch.float64)))


def test_weights_that_vary_smoothly_with_depth_are_ode_like():
    found = measured(network(40, 1 / 40, smooth=True))
    assert found.label == "ODE-like"
    assert found.same_point
    assert found.persistence > 0.95
    assert found.straightness > 0.8
    assert max(found.solver_swaps.values()) < 0.05


@pytest.mark.parametrize("depth", [10, 40])
def test_independent_weights_are_sde_like_and_walk_at_random(depth):
    found = measured(network(depth, 1 / math.sqrt(depth), smooth=False))
    assert found.label == "SDE-like"
    assert abs(found.persistence) < 0.1
    assert found.straightness == pytest.approx(depth**-0.5, rel=0.3)


def test_one_field_with_a_step_that_is_too_large_is_neither():
    found = measured(network(8, 8.0, smooth=True))
    assert found.label == "neither"
    assert max(found.solver_swaps.values()) > 0.25


def test_cosines_are_those_of_the_fields_at_one_point():
    model = network(5, 0.3, smooth=False)
    flow = trace(model, torch.randn(3, 100, dtype=torch.float64))
    cosines = []
    for layer in range(4):
        x = flow.states[layer].tensors[0]
        with torch.no_grad():
            f, g = model[layer](x) - x, model[layer + 1](x) - x
        cosines.append(float(nn.functional.cosine_similarity(f, g, dim=1).mean()))
    assert continuous_limit(flow).persistence == pytest.approx(sum(cosines) / 4, rel=1e-10)


def test_blocks_that_need_more_than_the_state_are_compared_along_the_path():
    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(pre_norm() for _ in range(5))
            self.shift = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def forward(self, x):
            for layer in self.layers:
                x = 2 * layer(x) - x
            return x

    torch.manual_seed(0)
    found = continuous_limit(trace(WithMask().double(), torch.randn(2, 5, 8, dtype=torch.float64)))
    assert (found.same_point, found.solver_swaps) == (False, None)
    assert "along the path" in found.notes[0]


class RungeKutta(nn.Module):
    """One step of the classical method for x' = tanh(W x)."""

    def __init__(self, weight: torch.Tensor, h: float) -> None:
        super().__init__()
        self.weight, self.h = nn.Parameter(weight), h

    def forward(self, x):
        def f(y):
            return torch.tanh(y @ self.weight.T)

        h, k = self.h, f(x)
        total = k / 6
        for c, b in ((0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6)):
            k = f(x + c * h * k)
            total = total + b * k
        return x + h * total


@pytest.mark.parametrize(("h", "label"), [(0.2, "ODE-like"), (3.0, "neither")])
def test_a_method_is_replaced_by_one_of_its_own_order(h, label):
    torch.manual_seed(0)
    weight = torch.randn(100, 100, dtype=torch.float64) / 10
    found = measured(nn.Sequential(*(RungeKutta(weight - weight.T, h) for _ in range(8))))
    assert found.label == label
    if h < 1:  # the rotation turns by 70 degrees: methods of order 1 are off by a third
        assert max(found.solver_swaps.values()) < 1e-2


def test_fields_called_in_a_loop_are_swapped_too():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fields = nn.ModuleList(nn.Sequential(nn.Linear(100, 100), nn.Tanh()) for _ in range(8))

        def forward(self, x):
            for field in self.fields:
                x = x + 0.1 * field(x)
            return x

    torch.manual_seed(0)
    found = measured(Loop().double())
    assert found.same_point
    assert set(found.solver_swaps) == {"paired", "half steps"}


def test_a_plain_network_has_no_continuous_limit():
    flow = trace(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), torch.randn(2, 4))
    with pytest.raises(TraceError, match="longest run of steps x \\+ f\\(x\\) has 0 steps"):
        continuous_limit(flow)
