"""What is wrong with the loss is said of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine


def classifier(last: nn.Module, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes), last)


def inputs() -> Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def said(model: nn.Module, loss: Callable[[Any], Tensor]) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, inputs()), loss).findings if f.kind in ("loss", "saturated")]


LABELS = torch.arange(12) % 5
ONES = torch.ones(12, 1)

# the last module, the loss, what is said
TWICE: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], str]] = {
    "cross entropy of a softmax": (
        nn.Softmax(1),
        lambda p: functional.cross_entropy(p, LABELS),
        "cross_entropy expects logits and is given the output of a softmax (3): it cannot fall below 0.905",
    ),
    "cross entropy over positions": (
        nn.Softmax(-1),
        lambda p: functional.cross_entropy(p.unsqueeze(0).transpose(1, 2), LABELS.unsqueeze(0), label_smoothing=0.1),
        "cross_entropy expects logits",
    ),
    "nll of a softmax": (
        nn.Softmax(1),
        lambda p: functional.nll_loss(p, LABELS),
        "nll_loss expects log-probabilities and is given the output of a softmax",
    ),
    "sigmoid twice": (
        nn.Sigmoid(),
        lambda p: functional.binary_cross_entropy_with_logits(p, p.detach().round()),
        "binary_cross_entropy_with_logits expects logits and is given the output of a sigmoid",
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_loss_on_logits_that_is_given_probabilities(name):
    last, loss, words = TWICE[name]
    (found,) = said(classifier(last), loss)
    assert (found.kind, found.severity, found.module_path) == ("loss", "warning", "loss")
    assert words in found.evidence


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        (nn.Identity(), lambda p: functional.cross_entropy(p, LABELS)),
        (nn.LogSoftmax(1), lambda p: functional.nll_loss(p, LABELS)),
        (nn.LogSoftmax(1), lambda p: functional.cross_entropy(p, LABELS)),  # the same number
        (nn.Softmax(1), lambda p: -(p[torch.arange(12), LABELS]).log().mean()),
        (nn.Sigmoid(), lambda p: functional.binary_cross_entropy(p, p.detach().round())),
    ],
)
def test_losses_on_what_they_expect(last, loss):
    assert said(classifier(last), loss) == []


def discriminator(shift: float) -> nn.Sequential:
    model = classifier(nn.Sigmoid(), 1)
    model[2].bias.data.fill_(shift)
    return model


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: -functional.binary_cross_entropy(p, 0 * ONES),  # a generator that minimises log(1 - D)
        lambda p: 1000 * functional.mse_loss(p, ONES),
        lambda p: (1 - p).sum(),
    ],
)
def test_a_sigmoid_that_is_flat_where_it_is_wrong(loss):
    (found,) = said(discriminator(-8.0), loss)
    assert (found.kind, found.module_path) == ("saturated", "3")
    assert "turned round" in found.evidence
    assert "binary_cross_entropy_with_logits" in found.remedy
    assert found.actions == ()


def test_a_sigmoid_that_is_flat_where_it_is_right_or_whose_loss_undoes_it():
    (found,) = said(discriminator(8.0), lambda p: functional.binary_cross_entropy(p, ONES))
    assert (found.severity, found.remedy) == ("info", "none is needed")
    assert "flat, and right" in found.evidence
    (found,) = said(discriminator(-8.0), lambda p: -p.log().mean())  # a generator that minimises -log D
    assert (found.severity, found.remedy) == ("info", "none is needed")
    assert "its loss makes up for that" in found.evidence


def test_a_loss_without_gradient():
    (found,) = said(classifier(nn.Identity()), lambda out: out.clamp_min(50.0).mean())
    assert (found.kind, found.severity, found.module_path) == ("loss", "critical", "loss")
    assert "the loss is 50 and its gradient by the output is zero" in found.evidence
    assert said(classifier(nn.Identity()), lambda out: (out - 50).relu().mean()) == []  # at its least


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (nn.Identity(), "has no least value"),
        (nn.Softmax(1), "given the output of a softmax"),
        (nn.LogSoftmax(1), ""),
    ],
    ids=["raw logits", "probabilities", "log-probabilities"],
)
@pytest.mark.parametrize("images", [False, True])
def test_a_negative_log_likelihood_of_no_logarithms_is_named_once(last, said, images):
    torch.manual_seed(0)
    hidden = nn.Conv2d(3, 8, 1) if images else nn.Linear(3, 8)
    head = nn.Conv2d(8, 5, 1) if images else nn.Linear(8, 5)
    model = nn.Sequential(hidden, nn.Tanh(), head, last)
    x = torch.randn(16, 3, 4, 4) if images else torch.randn(16, 3)
    targets = torch.randint(5, (16, 4, 4) if images else (16,))
    found = examine(stabkit.trace(model, x), lambda out: nn.functional.nll_loss(out, targets)).findings
    named = [f.evidence for f in found if f.kind == "loss" and f.severity != "info"]
    assert len(named) == bool(said)
    assert all(said in evidence for evidence in named)
