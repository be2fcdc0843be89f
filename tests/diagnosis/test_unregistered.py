"""What a model holds and differentiates, and no optimizer will move, is named with what registers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

LABELS = torch.arange(16) % 3


class Holder:
    """A plain object that holds a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Net(nn.Module):
    """A stem, whatever is held, and a head."""

    def __init__(self, held: Any, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.held, self.use = held, use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.held, self.stem(x).tanh()))


def layers() -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]


def in_turn(held: Any, x: Tensor) -> Tensor:
    for layer in held.values() if isinstance(held, dict) else held:
        x = layer(x)
    return x


def said(model: nn.Module, loss: Callable[[Tensor], Tensor] | None = None) -> list[Finding]:
    flow = stabkit.trace(model, torch.randn(16, 6, generator=torch.Generator().manual_seed(1)))
    found = examine(flow, loss or (lambda out: functional.cross_entropy(out, LABELS))).findings
    return [f for f in found if f.kind == "unregistered"]


# what is held, how it is used, what is named, the remedy
HIDDEN: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], str, str]] = {
    "layers in a list": (layers(), in_turn, "held.0.weight, held.0.bias, held.2.weight", "nn.ModuleList"),
    "layers in a dict": (dict(zip("abc", layers(), strict=True)), in_turn, "held.a.weight, held.a.bias", "ModuleDict"),
    "a layer in an object": (Holder(layers()[0]), lambda h, x: h.layer(x), "held.layer.weight", "an nn.Module that"),
    "tensors in a tuple": (
        (torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)),
        lambda h, x: h[0] * x + h[1],
        "held.0, held.1",
        "nn.ParameterList",
    ),
    "a tensor": (torch.ones(8, requires_grad=True), lambda h, x: h * x, "held get", "nn.Parameter of it"),
    "a product of a parameter": (
        nn.Parameter(torch.ones(8)) * 0.5,
        lambda h, x: h * x,
        "held get",
        "nn.Parameter of the finished tensor",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_not_registered_is_named(name):
    held, use, named, remedy = HIDDEN[name]
    (found,) = said(Net(held, use))
    assert (found.severity, found.module_path) == ("warning", "held")
    assert named in found.evidence
    assert remedy in found.remedy
    assert 0 < found.numbers["gradient"] < 1


class Keeping(Net):
    """A model that keeps its input and what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        self.kept = [super().forward(x)]
        return self.kept[0]


HEALTHY: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]] = {
    "a ModuleList": (nn.ModuleList(layers()), in_turn),
    "a ParameterList": (nn.ParameterList([torch.ones(8)]), lambda h, x: h[0] * x),
    "frozen layers in a list": ([layers()[0].requires_grad_(False)], in_turn),
    "layers that are not used": (layers(), lambda h, x: x),
    "layers that are run without grad": (layers(), lambda h, x: x + in_turn(h, x).detach()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_registered_or_meant_is_no_fault(name):
    assert said(Net(*HEALTHY[name])) == []


def test_a_second_name_in_a_list_is_no_fault():
    model = Net([], in_turn)
    model.extra = nn.Linear(8, 8)
    model.held.append(model.extra)
    assert said(model) == []


def test_what_a_model_keeps_is_no_fault():
    model = Keeping(None, lambda _, x: x)
    model(torch.randn(16, 6, requires_grad=True))
    assert said(model) == []


def test_another_model_in_the_loss_is_no_fault():
    teacher = nn.Linear(8, 3)
    side = torch.randn(16, 8)
    assert said(Net(None, lambda _, x: x), lambda out: functional.mse_loss(out, teacher(side))) == []
