"""Parameters whose gradient is exactly zero and stays so are named with what holds them; those that move are not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, apply, examine

LABELS = torch.arange(16) % 3


def inputs() -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def said(model: nn.Module) -> list[Finding]:
    flow = stabkit.trace(model, inputs())
    found = examine(flow, lambda out: functional.cross_entropy(out, LABELS)).findings
    return [f for f in found if f.kind == "no_gradient"]


class Weighed(nn.Module):
    """A classifier whose weights are changed before they are used."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.change = nn.Linear(6, 12), nn.Linear(12, 3), change

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.change(self.first.weight), self.first.bias)
        return functional.linear(x.tanh(), self.change(self.last.weight), self.last.bias)


class Coded(nn.Module):
    """An encoder whose code is rounded, beside a way round it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.side, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.change(self.enc(x)) + self.side(x))


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank."""

    def __init__(self, start: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.head = nn.Linear(6, 12).requires_grad_(False), nn.Linear(12, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)
        start(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + self.up(self.down(x))).relu())


class Gated(nn.Module):
    """A residual branch behind a gate that starts at zero."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.zeros(1))
        last(self.branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        return self.head(x + self.gate * self.branch(x))


FLAT = {
    "rounded weights": (Weighed(lambda w: torch.round(w * 8) / 8), "torch.round", "first.weight, last.weight", 2),
    "signs for weights": (Weighed(lambda w: w.sign() * 0.3), "torch.sign", "first.weight, last.weight", 2),
    "a code of whole numbers": (Coded(torch.floor), "torch.floor", "enc.weight, enc.bias", 2),
}


@pytest.mark.parametrize("name", FLAT)
def test_operations_without_slope_are_named(name):
    model, operation, lost, count = FLAT[name]
    (found,) = said(model)
    assert (found.severity, found.numbers["parameters"]) == ("warning", count)
    assert operation in found.evidence
    assert lost in found.evidence
    assert "test_zero_gradients.py:" in found.evidence
    assert "with the derivative 1 in its place" in found.evidence


@pytest.mark.parametrize(
    ("model", "severity", "count", "drawn"),
    [(Adapted(nn.init.zeros_), "critical", 2, "down.weight"), (Gated(nn.init.zeros_), "warning", 2, "gate")],
    ids=["an adapter of zeros", "a gate of zero on a branch of zeros"],
)
def test_products_of_zeros_are_named_and_the_remedy_cures(model, severity, count, drawn):
    (found,) = said(model)
    assert (found.severity, found.numbers["parameters"]) == (severity, count)
    assert "in which" in found.evidence
    assert [action["parameter"] for action in found.actions] == [drawn]
    treated = copy.deepcopy(model)
    apply(treated, found)
    assert said(treated) == []


HEALTHY = {
    "straight through": Weighed(lambda w: w + (torch.round(w * 8) / 8 - w).detach()),
    "rounding beside a smooth way": Coded(lambda h: h + torch.round(h)),
    "an adapter with one factor of zeros": Adapted(nn.init.ones_),
    "a gate of zero": Gated(nn.init.orthogonal_),
    "a head of zeros": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
}
nn.init.zeros_(HEALTHY["a head of zeros"][2].weight)  # type: ignore[index,arg-type]


@pytest.mark.parametrize("name", HEALTHY)
def test_what_will_move_is_no_fault(name):
    assert said(HEALTHY[name]) == []


def test_a_loss_that_is_satisfied_is_no_fault():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    flow = stabkit.trace(model, inputs())
    found = examine(flow, lambda out: (out - 100).relu().mean()).findings
    assert [f for f in found if f.kind == "no_gradient"] == []


class Shifted(nn.Module):
    """A layer that learns all there is, and a product of two vectors of zeros beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.a, self.b = nn.Linear(64, 4), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.a * self.b


def test_vectors_without_which_a_model_trains_as_well_are_a_fact():
    torch.manual_seed(0)
    model, x, target = Shifted(), torch.randn(16, 64), torch.randn(16, 4)
    found = stabkit.analyze(model, x, loss=lambda out: (out - target).square().mean(), spectrum="none").findings
    assert [f.severity for f in found if f.kind == "no_gradient"] == ["info"]
