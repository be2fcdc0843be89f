"""The size of the input, and the slope of an activation, are named where they are the cause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Diagnosis, examine


def network(act: type[nn.Module], depth: int = 3, gain: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(16, 16)
        nn.init.orthogonal_(linear.weight, gain)
        layers += [linear, act()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def inputs() -> Tensor:
    return torch.rand(16, 16, generator=torch.Generator().manual_seed(1))


def said(model: nn.Module, x: Tensor) -> Diagnosis:
    return examine(stabkit.trace(model, x), probes=1)


# a division of the input that was tried as the remedy and helped is carried out by apply and treat, too
@pytest.mark.parametrize(("act", "actions"), [(nn.Tanh, ["scale_input"]), (nn.Sigmoid, [])])
def test_pixels_from_0_to_255_are_named_as_the_cause(act, actions):
    found = [f for f in said(network(act), 255 * inputs()).findings if "input_size" in f.numbers]
    assert [(f.kind, [action["action"] for action in f.actions]) for f in found] == [("saturated", actions)]
    assert "the input has the size 1" in found[0].evidence
    assert "standardise the input" in found[0].remedy


def test_weights_that_saturate_by_themselves_are_not_blamed_on_the_input():
    model = network(nn.Tanh)
    model[0].weight.data.mul_(300)
    assert not [f for f in said(model, inputs()).findings if "input_size" in f.numbers]
    assert not [f for f in said(network(nn.Tanh), inputs()).findings if "input_size" in f.numbers]


def test_a_sigmoid_that_makes_gradients_vanish_is_named_with_its_bound():
    found = said(network(nn.Sigmoid, depth=12), inputs()).findings
    assert any("sigmoid' <= 1/4" in f.evidence and f.kind == "vanishing" for f in found)
    assert not any("<=" in f.evidence for f in said(network(nn.ReLU, depth=12, gain=0.4), inputs()).findings)


@pytest.mark.parametrize("size", [1.0, 5000.0])
def test_an_input_that_saturates_a_late_tanh_through_relus_is_named(size):
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 3), nn.Tanh())
    found = [f for f in said(model, size * inputs()).findings if "input_size" in f.numbers]
    assert [f.kind for f in found] == (["saturated"] if size > 1 else [])
    assert all("standardise the input" in f.remedy for f in found)
