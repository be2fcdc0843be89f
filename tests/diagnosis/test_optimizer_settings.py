"""Settings of an optimizer that keep it from learning are told, each with what it is worth to leave it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding

_DRAWS = torch.Generator().manual_seed(0)
X = torch.randn(128, 16, generator=_DRAWS)
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()


def loss(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, Y)


def said(
    make: Callable[[nn.Sequential], torch.optim.Optimizer], of: Callable[[Tensor], Tensor] = loss
) -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    report = stabkit.analyze(model, X, loss=of, optimizer=make(model), spectrum="none")
    return [f for f in report.findings if f.severity != "info"]


def groups(rate: float) -> Callable[[nn.Sequential], torch.optim.Optimizer]:
    def make(model: nn.Sequential) -> torch.optim.Optimizer:
        body = [p for layer in model[:-1] for p in layer.parameters()]
        return torch.optim.Adam([{"params": body, "lr": rate}, {"params": model[-1].parameters()}], lr=3e-3)

    return make


def settings(kind: Any, **options: Any) -> Callable[[nn.Sequential], torch.optim.Optimizer]:
    return lambda model: kind(model.parameters(), **options)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (settings(torch.optim.Adam, lr=1e-3, maximize=True), "unstable_update", "set to maximize=True"),
        (groups(0.0), "idle_update", "4 parameters that are to be trained (0.weight, 0.bias, 2.weight, 2.bias)"),
        (settings(torch.optim.SGD, lr=0.1, momentum=0.999), "unstable_update", "the momentum 0.999 of SGD"),
    ],
)
def test_a_setting_that_keeps_it_from_learning(make, kind, words):
    (found,) = said(make)
    assert found.kind == kind
    assert words in found.evidence
    assert found.numbers["other"] < found.numbers["end"]


@pytest.mark.parametrize(
    "make",
    [
        settings(torch.optim.Adam, lr=1e-3),
        groups(1e-3),
        settings(torch.optim.SGD, lr=0.1, momentum=0.9),
        settings(torch.optim.SGD, lr=1e-4, momentum=0.999),
    ],
)
def test_usual_settings_raise_nothing(make):
    assert said(make) == []


def test_an_optimizer_that_needs_a_closure_is_noted_and_no_more():
    assert said(settings(torch.optim.LBFGS)) == []


def test_a_reward_is_to_be_climbed():
    def reward(out: Tensor) -> Tensor:
        return out.log_softmax(1)[torch.arange(128), Y].mean()

    assert said(settings(torch.optim.Adam, lr=1e-3, maximize=True), reward) == []


@pytest.mark.parametrize(("temperature", "count"), [(1000.0, 1), (2.0, 0)])
def test_a_gradient_that_is_next_to_nothing_at_an_ordinary_rate(temperature, count):
    scores = 5 * functional.one_hot(Y, 4) + torch.randn(128, 4, generator=torch.Generator().manual_seed(1))

    def distilled(out: Tensor) -> Tensor:
        of_teacher = (scores / temperature).softmax(1)
        return functional.kl_div((out / temperature).log_softmax(1), of_teacher, reduction="batchmean")

    found = said(settings(torch.optim.SGD, lr=0.1, momentum=0.9), distilled)
    assert [f.kind for f in found] == ["idle_update"] * count
    assert all("multiply the loss by about 1e+06" in f.remedy for f in found)
