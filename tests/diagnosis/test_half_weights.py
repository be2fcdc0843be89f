"""Weights that Adam is to train in half precision."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import serious

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X @ torch.randn(8, 4, generator=torch.Generator().manual_seed(2)))


def squares(out: Tensor) -> Tensor:
    return functional.mse_loss(out.float(), Y)


class Steps(nn.Module):
    """A recurrent module over the halves of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 2, 4))[0][:, -1])


def network(kind: str = "layers", gain: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    if kind == "recurrent":
        return Steps()
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    model[0].weight.data.mul_(gain)
    return model


def found(model: nn.Module, x: Tensor) -> list[stabkit.Finding]:
    return [f for f in stabkit.diagnose(stabkit.trace(model, x).following(squares), squares) if serious(f)]


def after_adam(model: nn.Module, x: Tensor, **options: float) -> float:
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **options)
    for _ in range(5):
        optimizer.zero_grad()
        squares(model(x)).backward()
        optimizer.step()
    return float(squares(model(x)).detach())


@pytest.mark.parametrize("kind", ["layers", "recurrent"])
def test_an_eps_that_float16_rounds_to_zero_is_said(kind):
    model, x = network(kind).half(), X.half()
    assert math.isnan(after_adam(model, x))  # which is what torch makes of it
    assert math.isfinite(after_adam(model, x, eps=1e-4))
    (told,) = found(model, x)
    assert (told.kind, told.severity) == ("precision_loss", "critical")
    assert "the weights are float16, in which Adam's eps of 1e-08 is zero" in told.evidence
    assert "20 steps of Adam end in what is not finite" in told.evidence
    assert "keep the weights in float32" in told.remedy
    assert "and with all in float32" in told.evidence
    assert "autocast" in told.remedy.partition(";")[2]
    assert "which was not tried" in told.remedy
    assert "0.0001 leaves" in told.remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_said_where_it_trains(dtype):
    assert not found(network().to(dtype), X.to(dtype))


def test_steps_that_bfloat16_rounds_away_are_said():
    assert not found(_Offset(), X)
    (told,) = found(_Offset().bfloat16(), X.bfloat16())
    assert told.kind == "precision_loss"
    assert "the weights are bfloat16, and a step of 0.001 is lost in 100% of them" in told.evidence


def test_what_bfloat16_loses_at_the_rates_of_fine_tuning_is_a_fact():
    torch.manual_seed(0)
    norms = [nn.LayerNorm(512) for _ in range(2)]
    layers = [nn.Linear(256, 512), norms[0], nn.GELU(), nn.Linear(512, 512), norms[1], nn.GELU(), nn.Linear(512, 8)]
    model = nn.Sequential(*layers)
    x, y = torch.randn(64, 256), torch.randint(8, (64,))
    report = stabkit.analyze(
        model.bfloat16(), x.bfloat16(), loss=lambda out: functional.cross_entropy(out.float(), y), spectrum="none"
    )
    (told,) = [f for f in report.findings if f.kind == "precision_loss"]
    assert told.severity == "info"
    share = float(re.search(r"(\d+)% of a step are lost", told.evidence)[1])
    lost, count = 0, 0
    for p in model.parameters():
        lost += int(((p - 2e-5 * torch.ones_like(p)) == p).sum())  # the first step of Adam is the rate, either way
        count += p.numel()
    assert share == pytest.approx(100 * lost / count, abs=3)


def test_a_model_that_keeps_a_tensor_of_its_graph_is_tried_as_well():
    class Keeping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    torch.manual_seed(0)
    model = Keeping(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).half()
    model(X.half())
    (told,) = found(model, X.half())
    assert "and with all in float32" in told.evidence


def test_frozen_weights_in_half_are_left_alone():
    model = network().half().requires_grad_(False)
    head = nn.Linear(4, 4)
    body = nn.Sequential(model, _Wider(), head)
    assert not found(body, X.half())


class _Wider(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def with_optimizer(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> list[stabkit.Finding]:
    report = stabkit.analyze(model, x, loss=squares, spectrum="none", optimizer=optimizer)
    return [f for f in report.findings if f.kind == "precision_loss"]


def given(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    p = model.parameters()
    return {
        "adam": lambda: torch.optim.Adam(p, lr=1e-3),
        "adam, large eps": lambda: torch.optim.Adam(p, lr=1e-3, eps=1e-4),
        "rmsprop": lambda: torch.optim.RMSprop(p, lr=1e-3),
        "rmsprop, large eps": lambda: torch.optim.RMSprop(p, lr=1e-3, eps=1e-4),
        "sgd": lambda: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "two groups": lambda: torch.optim.AdamW(
            [{"params": model[0].parameters(), "eps": 1e-4}, {"params": model[2].parameters()}], lr=1e-3
        ),
    }[kind]()


@pytest.mark.parametrize("kind", ["adam, large eps", "rmsprop, large eps", "sgd"])
def test_an_optimizer_that_float16_holds_is_taken_as_it_is(kind):
    model = network().half()
    assert not with_optimizer(model, X.half(), given(kind, model))


@pytest.mark.parametrize("kind", ["adam", "rmsprop", "two groups"])
def test_the_eps_that_is_zero_is_that_of_the_optimizer_that_is_given(kind):
    model = network().half()
    optimizer = given(kind, model)
    (told,) = with_optimizer(model, X.half(), optimizer)
    assert told.severity == "critical"
    assert f"{type(optimizer).__name__}'s eps of 1e-08 is zero" in told.evidence
    assert f"{type(optimizer).__name__} an eps that float16 holds: 0.0001 leaves" in told.remedy
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not optimizer.state


@pytest.mark.parametrize(("rate", "lost"), [(1e-2, True), (0.1, False)])
def test_steps_of_the_optimizer_that_is_given_are_lost_or_not_by_its_rate(rate, lost):
    model = _Offset().bfloat16()
    told = with_optimizer(model, X.bfloat16(), torch.optim.Adam(model.parameters(), lr=rate))
    assert [("a step of 0.01 is lost" in f.evidence, f.severity) for f in told] == [(True, "warning")] * lost


class _Offset(nn.Module):
    """A function of weights about a large number, beside which a step is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(8.0 + 0.3 * torch.randn(8, 4, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight - 8.0))
