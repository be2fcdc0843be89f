"""What every call of a model makes anew is no part of it; what is built once, or copied, is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious

TARGETS = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A stem and a head, with something between that may be made while it runs."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between
        self.built: nn.Module | None = None
        self.weight = nn.Parameter(torch.randn(8, 8) / 8**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return self.head(h + self.between(self, h) + h @ self.weight)


def attribute(net: nn.Module, h: Tensor) -> Tensor:
    net.inner = nn.Linear(8, 8)
    return net.inner(h)


def local(_net: nn.Module, h: Tensor) -> Tensor:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())(h)


def bare(net: nn.Module, h: Tensor) -> Tensor:
    net.w = nn.Parameter(torch.empty(8, 8))
    nn.init.xavier_uniform_(net.w)
    return h @ net.w


def norm(_net: nn.Module, h: Tensor) -> Tensor:
    return nn.BatchNorm1d(8)(h)


def lazily(net: nn.Module, h: Tensor) -> Tensor:
    if net.built is None:
        net.built = nn.Linear(h.shape[1], 8)
    return net.built(h)


def copied(net: nn.Module, h: Tensor) -> Tensor:
    return copy.deepcopy(net.stem)(functional.pad(h, (0, -2)))


def made_of(net: nn.Module, h: Tensor) -> Tensor:
    return torch.func.functional_call(net.stem, {"weight": 2 * net.stem.weight}, (functional.pad(h, (0, -2)),))


def noise(_net: nn.Module, h: Tensor) -> Tensor:
    return h * torch.randn(8, requires_grad=True)


def said(model: nn.Module) -> list[Finding]:
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    found = examine(stabkit.trace(model, inputs), lambda out: (out - TARGETS).square().mean()).findings
    return [f for f in found if f.kind in ("unregistered", "no_gradient")]


ANEW = {"attribute": attribute, "local": local, "bare": bare, "norm": norm}


@pytest.mark.parametrize("name", ANEW)
@pytest.mark.parametrize("called", [False, True])
def test_what_every_call_makes_anew_is_told(name, called):
    model = Net(ANEW[name])
    if called:
        model(torch.zeros(4, 6))
    (found,) = (f for f in said(model) if serious(f))
    assert found.kind == "unregistered"
    assert "are made anew by every call" in found.evidence
    assert "test_made_anew.py:" in found.evidence


@pytest.mark.parametrize("between", [copied, made_of, noise])
def test_copies_and_functions_raise_nothing(between):
    assert not [f for f in said(Net(between)) if serious(f)]


def test_what_the_first_call_builds_is_a_fact():
    (found,) = (f for f in said(Net(lazily)) if f.kind == "unregistered")
    assert found.severity == "info"
    assert "by the first call" in found.evidence
    model = Net(lazily)
    model(torch.zeros(4, 6))
    assert said(model) == []
