"""Units that are copies of each other are found, and drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stabkit
from stabkit.diagnosis import Finding, apply, examine


def network(act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 3))


def pixels() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def said(model: nn.Sequential) -> list[Finding]:
    shape = (4, 8) if isinstance(model[0], nn.Linear) else (4, 2, 6, 6)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return [f for f in examine(stabkit.trace(model, x)).findings if f.kind == "copied_units"]


def constant(layer: nn.Module, value: float = 0.1) -> None:
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)


@pytest.mark.parametrize(
    ("make", "place", "spoil"),
    [
        (network, 2, constant),
        (network, 0, lambda layer: constant(layer, -0.3)),
        (pixels, 2, constant),
        (network, 2, lambda layer: (layer.weight.data.copy_(layer.weight.data[:1].clone()), nn.init.ones_(layer.bias))),
    ],
)
def test_copies_are_found_and_drawn_anew(make, place, spoil):
    model = make()
    spoil(model[place])
    (found,) = said(model)
    assert (found.kind, found.module_path, found.numbers["distinct"]) == ("copied_units", str(place), 1)
    assert apply(model, found) == 1
    assert said(model) == []


def test_units_that_differ_somewhere_are_no_copies():
    assert said(network()) == []
    biases = network()
    nn.init.constant_(biases[2].weight, 0.1)  # biases of their own
    assert said(biases) == []
    frozen = network()
    constant(frozen[2])
    frozen[2].requires_grad_(False)
    assert said(frozen) == []
    started_at_zero = network()
    constant(started_at_zero[4], 0.0)
    assert said(started_at_zero) == []


def test_every_layer_is_drawn_by_its_own_fan_in():
    model = network()
    constant(model[0])
    constant(model[2])
    (found,) = said(model)
    sizes = {action["parameter"]: action["rms"] for action in found.actions}
    assert sizes == pytest.approx({"0.weight": 8**-0.5, "2.weight": 16**-0.5})
