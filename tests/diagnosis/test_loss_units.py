"""Targets far from the output, and gradients below Adam's eps: told where training shows it, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.remedies.usual_training import adam, left_after, sgd
from stabkit.tracing.recording.forward_pass import ForwardPass

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
SHAPE = torch.tanh(X[:, :1]) + 0.5 * X[:, 1:2] * X[:, 2:3]
LABELS = (X[:, 0] > 0).long()


class Scaled(nn.Module):
    """A network whose output is stretched."""

    def __init__(self, by: float = 1.0, start: float = 0.0, outputs: int = 1, act: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, outputs))
        self.by, self.start = by, start

    def forward(self, x: Tensor) -> Tensor:
        return self.start + self.by * self.net(x)


def said(model: nn.Module, loss: Callable[[Any], Tensor]) -> list[Finding]:
    before = [p.detach().clone() for p in model.parameters()]
    found = [f for f in examine(stabkit.trace(model, X), loss).findings if f.kind == "loss"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    return found


FAR: dict[str, tuple[nn.Module, Tensor]] = {
    "prices": (Scaled(act=nn.ReLU), 300_000 + 70_000 * SHAPE),
    "counts": (Scaled(act=nn.GELU), 2e6 * (1.5 + SHAPE)),
    "several": (Scaled(outputs=3, act=nn.ReLU), 1e5 * torch.cat([SHAPE, 1 - SHAPE, X[:, 3:4]], 1)),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("how", ["function", "operations"])
def test_targets_that_no_usual_rate_reaches_are_told_with_what_standardising_is_worth(name: str, how: str):
    model, targets = FAR[name]
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "function": lambda out: functional.mse_loss(out, targets),
        "operations": lambda out: (out.squeeze() - targets.squeeze()).square().mean(),
    }
    (found,) = said(model, losses[how])
    assert (found.severity, found.module_path) == ("warning", "loss")
    assert found.numbers["mean"] == pytest.approx(float(targets.mean()), rel=1e-4)
    assert "with standardised targets SGD leaves" in found.evidence
    assert "standardise the targets" in found.remedy


def test_the_remedy_by_hand_is_what_it_says():
    model, targets = FAR["prices"]
    mean, spread = targets.mean(), targets.std(correction=0)
    call = ForwardPass(model, model, (X,), {}, 0)
    plain = left_after(call, lambda out: functional.mse_loss(out, targets), [sgd(1e-2), sgd(1e-3)])
    cured = left_after(call, lambda out: functional.mse_loss(out, (targets - mean) / spread), [sgd(1e-2), sgd(1e-3)])
    assert plain > 1.0 > cured


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        (Scaled(), SHAPE),
        (Scaled(), 40 + 10 * SHAPE),  # years
        (Scaled(by=70_000, start=300_000), 300_000 + 70_000 * SHAPE),  # an output that begins there
        (Scaled(), (0.01 * SHAPE)),
    ],
)
def test_a_regression_that_trains_at_usual_rates_raises_nothing(model, targets):
    assert said(model, lambda out: functional.mse_loss(out, targets)) == []


def test_targets_that_adam_comes_nearer_to_are_a_fact_and_no_fault():
    found = said(Scaled(), lambda out: functional.mse_loss(out, 1000 + 300 * SHAPE))
    assert [f.severity for f in found] in ([], ["info"])


SMALL: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "currents": (Scaled(by=1e-9), lambda out: functional.mse_loss(out, 1e-9 * SHAPE)),
    "absolute": (Scaled(by=1e-10), lambda out: (out - 1e-10 * SHAPE).abs().mean()),
    "weighted": (Scaled(outputs=2), lambda out: 1e-12 * functional.cross_entropy(out, LABELS)),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_below_the_eps_of_adam_are_told_with_what_a_larger_loss_is_worth(name: str):
    model, loss = SMALL[name]
    (found,) = said(model, loss)
    assert (found.severity, found.numbers["epsilon"]) == ("warning", 1e-8)
    assert found.numbers["gradient"] < 1e-8
    assert "eps" in found.remedy
    factor = 1 / found.numbers["gradient"]
    call = ForwardPass(model, model, (X,), {}, 0)
    assert left_after(call, loss, [adam(1e-2)]) > 0.99 > left_after(call, lambda out: factor * loss(out), [adam(1e-2)])


@pytest.mark.parametrize(("eps", "count"), [(1e-8, 1), (1e-20, 0)])
def test_the_eps_is_that_of_the_optimizer_that_is_given(eps: float, count: int):
    model, loss = SMALL["weighted"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=eps)
    report = stabkit.analyze(model, X, loss=loss, spectrum="none", optimizer=optimizer)
    assert [f.numbers["epsilon"] for f in report.findings if "eps" in f.remedy] == [1e-8] * count


def test_gradients_that_are_small_since_all_is_learnt_raise_nothing():
    model = Scaled()
    with torch.no_grad():
        learnt = model(X) * (1 + 1e-9) + 1e-9
    assert said(model, lambda out: functional.mse_loss(out, learnt)) == []
    sure = Scaled(by=60.0, outputs=2)
    with torch.no_grad():
        labels = sure(X).argmax(1)
    assert said(sure, lambda out: 1e-7 * functional.cross_entropy(out, labels)) == []


def test_the_optimizers_are_those_of_torch():
    for ours, theirs in ((adam(1e-2), torch.optim.Adam), (sgd(1e-2), torch.optim.SGD)):
        model = Scaled()
        call = ForwardPass(model, model, (X,), {}, 0)
        left = left_after(call, lambda out: functional.mse_loss(out, SHAPE), [ours])
        optimizer, values = theirs(model.parameters(), lr=1e-2), []
        for _ in range(21):
            optimizer.zero_grad()
            value = functional.mse_loss(model(X), SHAPE)
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
        assert left == pytest.approx(values[-1] / values[0], rel=1e-4)


def test_targets_that_the_given_optimizer_hardly_moves_towards():
    """A rate of .01 comes nearer, so that without an optimizer it is a fact at most; .001 needs thousands of steps."""
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    targets = 100 * (x @ torch.randn(10, 1))
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def said_of(times: float, **options: Any) -> list[Finding]:
        report = stabkit.analyze(
            model, x, loss=lambda out: functional.mse_loss(out, times * targets), spectrum="none", **options
        )
        return [f for f in report.findings if f.severity != "info"]

    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert said_of(1.0) == []
    (found,) = said_of(1.0, optimizer=adam)
    assert "20 steps of the Adam that is given, at its own settings: leaves 9" in found.evidence
    assert said_of(0.01, optimizer=adam) == []
