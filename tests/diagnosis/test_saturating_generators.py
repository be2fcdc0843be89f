"""log(1 - D) of a discriminator that is sure is told, with -log D tried; losses that keep their slope are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

Loss = Callable[[Tensor], Tensor]
ZEROS, ONES = torch.zeros(16, 1), torch.ones(16, 1)


def said(loss: Loss, sure: float) -> list[Finding]:
    """What is said of a generator whose loss closes over a discriminator, the surer the lower its last bias."""
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    judge[2].bias.data.fill_(sure)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    found = examine(stabkit.trace(model, torch.randn(16, 8)), lambda out: loss(judge(out))).findings
    return [f for f in found if f.kind == "loss"]


def softplus(logits: Tensor) -> Tensor:
    return -functional.softplus(logits).mean()


def logarithm(logits: Tensor) -> Tensor:
    return torch.log(1 - logits.sigmoid() + 1e-8).mean()


def cross_entropy(logits: Tensor) -> Tensor:
    return -nn.BCEWithLogitsLoss()(logits, ZEROS)


def log_sigmoid(logits: Tensor) -> Tensor:
    return functional.logsigmoid(-logits).mean()


SATURATING = [softplus, logarithm, cross_entropy, log_sigmoid]


@pytest.mark.parametrize("loss", SATURATING)
def test_log_of_one_less_d(loss: Loss) -> None:
    (found,) = said(loss, -9.0)
    assert found.severity == "warning"
    assert "log(1 - D)" in found.evidence
    assert "minimise -log D(G(z))" in found.remedy
    assert found.numbers["treated"] > 1000 * found.numbers["gradient"]


@pytest.mark.parametrize("loss", SATURATING)
def test_a_discriminator_in_doubt_is_no_trouble(loss: Loss) -> None:
    assert not said(loss, 0.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda d: nn.BCEWithLogitsLoss()(d, ONES),
        lambda d: functional.softplus(-d).mean(),
        lambda d: -torch.log(d.sigmoid() + 1e-8).mean(),
        lambda d: -d.mean(),
        lambda d: (d - 1).square().mean(),
        lambda d: nn.BCEWithLogitsLoss()(d, ZEROS),
    ],
)
def test_losses_that_keep_their_slope(loss: Loss) -> None:
    assert not [f for f in said(loss, -9.0) if "log(1 - D)" in f.evidence]
