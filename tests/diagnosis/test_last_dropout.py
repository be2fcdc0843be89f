"""Dropout of the predictions themselves puts a floor under the loss; dropout before the last layer does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.losses.last_dropout import _expected_log

SAMPLES = 64
INPUTS = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))
Y = 2 + INPUTS[:, 0] + INPUTS[:, 1] * INPUTS[:, 2]
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def body(outputs: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, outputs)]


def said(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> list[Finding]:
    found = examine(stabkit.trace(model, INPUTS), loss).findings
    return [f for f in found if f.kind == "loss" and "dropout" in f.evidence]


class ByHand(nn.Module):
    """A function of torch, or one that is written out."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.drop = nn.Sequential(*body(1)), drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x)).squeeze(-1)


def squares(out: Tensor) -> Tensor:
    return functional.mse_loss(out.reshape(-1), Y)


def entropy(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, LABELS)


# model, loss, the floor
DROPPED: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], float]] = {
    "module": (lambda: nn.Sequential(*body(1), nn.Dropout(0.5)), squares, 0.5 * float(Y.square().mean())),
    "function": (
        lambda: ByHand(lambda h: functional.dropout(h, 0.3)),
        lambda out: (out - Y).square().mean(),
        0.3 * float(Y.square().mean()),
    ),
    "written out": (
        lambda: ByHand(lambda h: h * _mask(h, 0.2)),
        squares,
        0.2 * float(Y.square().mean()),
    ),
    "logits": (
        lambda: nn.Sequential(*body(3), nn.Dropout(0.5)),
        entropy,
        0.5 * (0.5 * math.log(2) + 0.25 * math.log(3)),
    ),
    "probabilities": (
        lambda: nn.Sequential(*body(3), nn.Dropout(0.5), nn.LogSoftmax(1)),
        lambda out: functional.nll_loss(out, LABELS),
        0.5 * (0.5 * math.log(2) + 0.25 * math.log(3)),
    ),
    "before a tanh": (
        lambda: nn.Sequential(*body(1), nn.Dropout(0.5), nn.Tanh()),
        squares,
        0.5 * float(Y.square().mean()),
    ),
    "one logit": (
        lambda: nn.Sequential(*body(1), nn.Dropout(0.4)),
        lambda out: functional.binary_cross_entropy_with_logits(out.squeeze(-1), (LABELS > 0).float()),
        0.4 * math.log(2),
    ),
}


def _mask(like: Tensor, share: float) -> Tensor:
    return (torch.rand_like(like) > share).float() / (1 - share)


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_of_predictions_is_told_with_its_floor(name):
    make, loss, floor = DROPPED[name]
    (found,) = said(make(), loss)
    assert serious(found)
    assert found.numbers["floor"] == pytest.approx(floor, rel=1e-4)


HEALTHY: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "before the last layer": (
        lambda: nn.Sequential(*body(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1)),
        squares,
    ),
    "in eval mode": (lambda: nn.Sequential(*body(1), nn.Dropout(0.5)).eval(), squares),
    "of nothing": (lambda: nn.Sequential(*body(1), nn.Dropout(0.0)), squares),
    "before a sigmoid": (lambda: nn.Sequential(*body(1), nn.Dropout(0.5), nn.Sigmoid()), squares),
    "before a softplus": (lambda: nn.Sequential(*body(1), nn.Dropout(0.5), nn.Softplus()), squares),
    "before a softmax": (
        lambda: nn.Sequential(*body(3), nn.Dropout(0.5), nn.Softmax(1)),
        lambda out: functional.mse_loss(out, functional.one_hot(LABELS, 3).float()),
    ),
    "beside a skip": (lambda: ByHand(lambda h: h + functional.dropout(0.1 * h, 0.5)), squares),
    "features of a head in the loss": (
        lambda: nn.Sequential(*body(16), nn.Dropout(0.5)),
        lambda out: entropy(out @ torch.ones(16, 3).cumsum(1)),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_other_dropout_raises_nothing(name):
    make, loss = HEALTHY[name]
    assert said(make(), loss) == []


def test_little_dropout_of_logits_is_a_fact():
    (found,) = said(nn.Sequential(*body(3), nn.Dropout(0.05)), entropy)
    assert found.severity == "info"


@pytest.mark.parametrize(("count", "share"), [(9, 0.3), (1, 0.5), (200, 0.9), (1500, 0.8)])
def test_the_expected_logarithm_is_that_of_a_binomial(count, share):
    """Exactly, also where the first of the probabilities is below every double."""
    of, whole = share.as_integer_ratio()  # integers alone: fractions would be made coprime at every step
    chances = [math.comb(count, k) * of**k * (whole - of) ** (count - k) / whole**count for k in range(count + 1)]
    exact = sum(chance * math.log1p(k) for k, chance in enumerate(chances))
    assert _expected_log(count, share) == pytest.approx(exact, rel=1e-10)


def test_the_floor_is_what_free_predictions_come_to():
    """The mean over all draws of the dropout, at the best predictions that there are: it is reached, and not passed."""
    make, loss, _ = DROPPED["module"]
    (found,) = said(make(), loss)
    free = torch.zeros(SAMPLES, dtype=torch.float64, requires_grad=True)
    kept = 0.5 * ((2 * free - Y).square() + Y.square()).mean()  # kept and doubled, or dropped
    (slope,) = torch.autograd.grad(kept, free, create_graph=True)
    curvature = torch.autograd.grad(slope.sum(), free)[0]
    best = (free - slope / curvature).detach()  # the least of a parabola
    least = float(0.5 * ((2 * best - Y).square() + Y.square()).mean())
    assert found.numbers["floor"] == pytest.approx(least, rel=1e-6)


def test_weights_of_a_binary_cross_entropy_count_in_its_floor():
    weight, positive = torch.linspace(0.1, 2.0, SAMPLES), torch.tensor(3.0)
    targets = (LABELS > 0).float()

    def loss(out: Tensor) -> Tensor:
        given = functional.binary_cross_entropy_with_logits
        return given(out.squeeze(-1), targets, weight, reduction="sum", pos_weight=positive)

    (found,) = said(nn.Sequential(*body(1), nn.Dropout(0.4)), loss)
    assert found.numbers["floor"] == pytest.approx(0.4 * float(loss(torch.zeros(SAMPLES, 1))), rel=1e-6)
