"""Terms of a loss that are reduced otherwise are named where one of them is not learnt for it, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.losses.drowned_terms import drowned_term_findings
from stabkit.diagnosis.losses.reductions import Summand, summands_of
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.training_pass import training_pass

ROWS, PIXELS = 32, 48
Outputs = tuple[Tensor, Tensor, Tensor]


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.sigmoid(torch.randn(ROWS, 3, generator=generator) @ torch.randn(3, PIXELS, generator=generator) * 1.5)


class Autoencoder(nn.Module):
    """A variational one, which returns the image, the mean and the logarithm of the variance of its code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mean, self.log_variance = nn.Linear(PIXELS, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.back, self.last = nn.Linear(4, 32), nn.Linear(32, PIXELS)

    def forward(self, x: Tensor) -> Outputs:
        h = torch.relu(self.first(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return torch.sigmoid(self.last(torch.relu(self.back(code)))), mean, log_variance


class WithLoss(Autoencoder):
    """The same with its loss in its code."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return functional.mse_loss(out[0], x) + divergence(out).sum()


def divergence(out: Outputs) -> Tensor:
    """Of the code from the standard normal one, by sample and by entry of it."""
    return -0.5 * (1 + out[2] - out[1].pow(2) - out[2].exp())


X = images()
Loss = Callable[[Any], Tensor]
DROWNED: dict[str, Loss] = {
    "mean beside sum": lambda out: functional.mse_loss(out[0], X) + divergence(out).sum(),
    "mean beside a sum over the code": lambda out: (
        functional.binary_cross_entropy(out[0], X) + divergence(out).sum(1).mean()
    ),
    "by hand": lambda out: ((out[0] - X) ** 2).mean() + divergence(out).sum() / ROWS,
}
HEALTHY: dict[str, Loss] = {
    "sums": lambda out: functional.mse_loss(out[0], X, reduction="sum") + divergence(out).sum(),
    "four times the divergence": lambda out: (
        (functional.binary_cross_entropy(out[0], X, reduction="sum") + 4 * divergence(out).sum()) / ROWS
    ),
    "a weight that was chosen": lambda out: functional.mse_loss(out[0], X) + 2.5e-4 * divergence(out).sum(1).mean(),
    "a penalty on nothing of the sample": lambda out: functional.mse_loss(out[0], X) + 1e-3 * out[1].abs().mean(),
}


def said(model: nn.Module, loss: Loss) -> list[Finding]:
    flow = stabkit.trace(model, X)
    run = TrainingRun(flow, loss, flow.forward_pass, training_pass(flow.forward_pass, loss))
    return drowned_term_findings(run, ())


@pytest.mark.parametrize("name", DROWNED)
def test_an_error_that_is_averaged_drowns_beside_a_divergence_that_is_summed(name: str):
    (found,) = said(Autoencoder(), DROWNED[name])
    assert found.severity == "warning"
    assert "nothing of a sample is learnt" in found.evidence
    assert found.numbers["treated"] < 0.7 * found.numbers["left"] or "cross_entropy" in found.evidence
    assert "reduce the terms of the loss alike" in found.remedy


def test_a_model_that_returns_its_loss_is_judged_by_its_errors():
    (found,) = said(WithLoss(), lambda out: out)
    assert found.numbers["times"] == pytest.approx(ROWS * PIXELS)


def test_the_diagnosis_says_so():
    found = examine(stabkit.trace(Autoencoder(), X), DROWNED["mean beside sum"]).findings
    assert any("reduced otherwise" in each.evidence for each in found)


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_learnt_or_reduced_alike_raises_nothing(name: str):
    assert not said(Autoencoder(), HEALTHY[name])


def read(loss: Tensor) -> list[tuple[tuple[int, ...], str, float, float]]:
    return [(s.shape, s.of_rows, s.summed, s.averaged) for s in summands_of(loss)]


def test_reductions_are_read_off_the_graph():
    a, b = torch.randn(8, 6, requires_grad=True), torch.randn(8, 3, 5, requires_grad=True)
    labels = torch.arange(8) % 6
    assert read(a.pow(2).mean() + b.abs().sum()) == [((8, 6), "mean", 1, 6), ((8, 3, 5), "sum", 15, 1)]
    assert read(a.pow(2).sum() / 8 - 0.1 * b.exp().sum((1, 2)).mean()) == [
        ((8, 6), "mean", 6, 1),
        ((8, 3, 5), "mean", 15, 1),
    ]
    assert read((a.pow(2).sum(1) + b.exp().flatten(1).mean(1)).mean()) == [
        ((8, 6), "mean", 6, 1),
        ((8, 3, 5), "mean", 1, 15),
    ]
    assert read(a.pow(2).sum() / (8 * 6)) == [((8, 6), "mean", 1, 6)]
    assert read(functional.cross_entropy(a, labels) + functional.mse_loss(b, b.detach() + 1, reduction="sum")) == [
        ((8,), "mean", 1, 1),
        ((8, 3, 5), "sum", 15, 1),
    ]


def test_what_a_summand_counts_makes_up_the_loss():
    a = torch.randn(8, 6, requires_grad=True)
    one, two = a.pow(2).sum(1), a.exp().mean(1)
    loss = 3 * (one + 2 * two).mean()
    found: list[Summand] = summands_of(loss)
    parts = [summand.coefficient * value.sum() for summand, value in zip(found, (one, 2 * two), strict=True)]
    assert float(sum(parts).detach()) == pytest.approx(float(loss.detach()))
