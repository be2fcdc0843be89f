"""Several scales wrong at once: what is told trains with the user's own optimizer, and an absurd rate is a symptom."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious

DRAWN = torch.Generator().manual_seed(2)
AREA, YEAR = 40 + 160 * torch.rand(60, generator=DRAWN), 1950 + 70 * torch.rand(60, generator=DRAWN)
ROOMS = torch.randint(1, 6, (60,), generator=DRAWN).float()
RAW = torch.stack([AREA, YEAR, ROOMS], 1)
PRICE = (1800 * AREA + 900 * (YEAR - 1950) + 5000 * ROOMS + 2000 * torch.randn(60, generator=DRAWN))[:, None]
DEAR = PRICE.gt(PRICE.median()).long().squeeze(1)

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def network(outputs: int = 1, act: type[nn.Module] = nn.ReLU, norm: bool = False, gain: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(3) if norm else nn.Identity(), nn.Linear(3, 32), act(), nn.Linear(32, 32), act(),
        nn.Linear(32, outputs),
    )  # fmt: skip
    for layer in model[1::2]:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(gain)
    return model


def loss_of(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda out: functional.mse_loss(out, y) if y.is_floating_point() else functional.cross_entropy(out, y)


def analysed(model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer) -> tuple[Finding, ...]:
    return stabkit.analyze(model, x, loss=loss_of(y), optimizer=optimizer(model.parameters()), spectrum="none").findings


def left(model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer, steps: int = 60) -> float:
    own, first = optimizer(model.parameters()), float(loss_of(y)(model(x)).detach())
    for _ in range(steps):
        own.zero_grad()
        value = loss_of(y)(model(x))
        value.backward()
        own.step()
    return float(value.detach()) / first


SGD: Optimizer = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
MOMENTUM: Optimizer = lambda p: torch.optim.SGD(p, lr=3e-3, momentum=0.9)  # noqa: E731
# what is given, and what of it must be standardised
WRONG: dict[str, tuple[Tensor, Tensor, Optimizer, bool, bool]] = {
    "inputs and targets": (RAW, PRICE, SGD, True, True),
    "with momentum": (RAW, PRICE, MOMENTUM, True, True),
    "targets alone": (standard(RAW), PRICE, SGD, False, True),
    "inputs alone": (RAW, standard(PRICE), SGD, True, False),
    "inputs, with momentum": (RAW, standard(PRICE), MOMENTUM, True, False),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_told_of_scales_trains_with_the_own_optimizer_at_its_own_rate(name: str):
    x, y, optimizer, of_inputs, of_targets = WRONG[name]
    found = [f for f in analysed(network(1 if y.is_floating_point() else 2), x, y, optimizer) if serious(f)]
    (told,) = found
    assert ("of the input" in told.remedy) is of_inputs
    assert ("standardise the targets" in told.remedy) is of_targets
    assert "at its own rate" in told.evidence
    # the promise
    model = network(1 if y.is_floating_point() else 2)
    assert left(model, standard(x) if of_inputs else x, standard(y) if of_targets else y, optimizer) < 0.7


def test_a_rate_that_nobody_means_is_no_remedy():
    for x, y, optimizer, *_ in WRONG.values():
        found = analysed(network(1 if y.is_floating_point() else 2), x, y, optimizer)
        assert not any("e-1" in f.remedy or "e-0" in f.remedy.replace("e-03", "") for f in found if serious(f))


def test_a_rate_that_nobody_means_is_told_as_a_symptom_where_no_scale_of_the_data_cures_it():
    model = network(gain=60.0)
    found = [f for f in analysed(model, standard(RAW), standard(PRICE), SGD) if f.kind == "unstable_update"]
    for told in found:
        assert told.numbers["proposed_rate"] < 1e-6
        assert told.remedy.startswith("no rate: one of")


@pytest.mark.parametrize(
    ("model", "x", "y", "optimizer"),
    [
        (network(), standard(RAW), standard(PRICE), SGD),
        (network(norm=True), RAW, standard(PRICE), SGD),
        (network(2), standard(RAW), DEAR, MOMENTUM),
        (network(act=nn.Tanh), standard(RAW), standard(PRICE), lambda p: torch.optim.Adam(p, lr=3e-3)),
    ],
    ids=["standardised", "behind a norm", "classes", "adam"],
)
def test_data_of_unit_scale_raise_nothing(model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer):
    assert [f for f in analysed(model, x, y, optimizer) if serious(f)] == []


def test_a_rate_that_is_too_high_for_data_of_unit_scale_is_told_as_a_rate():
    found = analysed(network(), standard(RAW), standard(PRICE), lambda p: torch.optim.SGD(p, lr=5.0))
    (told,) = [f for f in found if serious(f)]
    assert told.kind == "unstable_update"
    assert told.remedy.startswith("lower the learning rate from 5 to")


def test_without_an_optimizer_both_are_told_where_either_alone_diverges():
    model = network()
    (told,) = [f for f in examine(stabkit.trace(model, RAW), loss_of(PRICE)).findings if f.kind == "loss"]
    assert "with both SGD leaves" in told.evidence
    assert "of the input" in told.remedy
    assert "standardise the targets" in told.remedy
