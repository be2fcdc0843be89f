"""Losses that are given what they are not made for are named; what they are made for raises nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.losses.domains import DOMAINS
from stabkit.errors import TraceError

SAMPLES, CLASSES = 24, 5
LABELS = torch.arange(SAMPLES) % CLASSES
ONE_HOT = functional.one_hot(LABELS, CLASSES).float()
SEVERAL = ((torch.arange(SAMPLES)[:, None] + torch.arange(CLASSES)) % 3 < 2).float()
HALF = (torch.arange(SAMPLES) % 2).float()
SOFT = torch.softmax(torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(3)), 1)
CTC_LENGTHS = torch.full((4,), 6), torch.full((4,), 2)


def said(last: nn.Module, loss: Callable[[Tensor], Tensor], width: int = CLASSES) -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, width), last)
    inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    return [f for f in examine(stabkit.trace(model, inputs), loss).findings if f.kind in ("loss", "non_finite")]


def _free(out: Tensor) -> Tensor:
    return (out[:, 0] - out[:, 0].detach() - 1.0).log().mean()  # a logarithm of -1


def _harmless(out: Tensor) -> Tensor:
    return functional.soft_margin_loss(out, ONE_HOT)  # asks for 1 and -1


def _breaking(out: Tensor) -> Tensor:
    return functional.kl_div(out.log_softmax(1), SOFT - 0.5, reduction="batchmean")


def _mended(out: Tensor) -> Tensor:
    return functional.kl_div(out.log_softmax(1), SOFT.log(), reduction="batchmean")


# losses, of which one begins not to be finite, and what is then to be said of it
BROKEN: dict[str, tuple[list[Callable[[Tensor], Tensor]], str]] = {
    "something else": ([_harmless, _free], ""),
    "the second misuse": ([_harmless, _breaking], "give the target as probabilities"),
    "the second, where it is known what was meant": ([_harmless, _mended], "log_target=True"),
    "something else behind a misuse": ([_harmless, _free, _harmless], ""),
    "counts below zero, and an exponential that overflows": (
        [lambda out: functional.poisson_nll_loss(out + 500, -ONE_HOT)],
        "",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_of_a_loss_that_is_not_finite_the_misuse_that_makes_it_so_is_told(name):
    parts, remedy = BROKEN[name]
    (found,) = said(nn.Identity(), lambda out: sum(part(out) for part in parts))
    assert found.kind == "non_finite"
    assert remedy in found.remedy
    assert "soft_margin_loss" not in found.evidence + found.remedy
    assert "counts" not in found.remedy


class Normalised(nn.Module):
    """A softmax that is written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        e = x.exp()
        return e / e.sum(1, keepdim=True)


def ctc(scores: Tensor, normalise: bool) -> Tensor:
    frames = scores.reshape(6, 4, CLASSES)
    frames = frames.log_softmax(-1) if normalise else frames
    return functional.ctc_loss(frames, torch.tensor([[1, 2]] * 4), *CTC_LENGTHS)


# last module, loss, words
WRONG: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], str]] = {
    "kl of a softmax": (
        nn.Softmax(1),
        lambda p: functional.kl_div(p, SOFT, reduction="batchmean"),
        "is given probabilities",
    ),
    "kl of a softmax by hand": (Normalised(), lambda p: nn.KLDivLoss(reduction="sum")(p, SOFT), "given probabilities"),
    "kl of logits": (
        nn.Identity(),
        lambda z: functional.kl_div(3 * z, SOFT, reduction="batchmean"),
        "kl_div expects log-probabilities as its first argument, and is given numbers from",
    ),
    "kl of a target of probabilities, called logarithms": (
        nn.LogSoftmax(1),
        lambda p: functional.kl_div(p, SOFT, log_target=True, reduction="batchmean"),
        "with log_target=True",
    ),
    "kl of logarithms, called probabilities": (
        nn.LogSoftmax(1),
        lambda p: functional.kl_div(p, SOFT.log(), reduction="batchmean"),
        "the target of kl_div is to be probabilities",
    ),
    "cross entropy of a softmax by hand": (
        Normalised(),
        lambda p: functional.cross_entropy(p, LABELS),
        "cross_entropy expects logits and is given probabilities",
    ),
    "cross entropy against a teacher's logits": (
        nn.Identity(),
        lambda z: functional.cross_entropy(z, 3 * SOFT - 1),
        "with weights below zero the loss has no least value",
    ),
    "cross entropy of several classes": (
        nn.Identity(),
        lambda z: functional.cross_entropy(z, SEVERAL),
        "they name several classes at once",
    ),
    "binary targets of 1 and 2": (
        nn.Identity(),
        lambda z: functional.binary_cross_entropy_with_logits(z, 1 + ONE_HOT),
        "go from 1 to 2",
    ),
    "binary targets of signs": (
        nn.Identity(),
        lambda z: functional.binary_cross_entropy_with_logits(z, 2 * ONE_HOT - 1),
        "go from -1 to 1",
    ),
    "signs that are zeros": (
        nn.Identity(),
        lambda z: functional.soft_margin_loss(z, ONE_HOT),
        "expects targets of 1 and -1, and 80% of those",
    ),
    "pairs that are zeros": (
        nn.Identity(),
        lambda z: functional.cosine_embedding_loss(z, SOFT, HALF),
        "cosine_embedding_loss expects targets of 1 and -1",
    ),
    "ctc of logits": (nn.Identity(), lambda z: ctc(z, False), "ctc_loss expects log-probabilities"),
    "counts below zero": (
        nn.Identity(),
        lambda z: functional.poisson_nll_loss(z, ONE_HOT - 1),
        "expects counts",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_outside_of_the_domain_of_a_loss_are_told(name):
    last, loss, words = WRONG[name]
    found = [f for f in said(last, loss) if serious(f)]
    assert len(found) == 1
    assert words in found[0].evidence


RIGHT: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "distillation": (nn.LogSoftmax(1), lambda p: functional.kl_div(p, SOFT, reduction="batchmean")),
    "distillation of logarithms": (
        nn.LogSoftmax(1),
        lambda p: functional.kl_div(p, SOFT.log(), reduction="batchmean", log_target=True),
    ),
    "terms that are not summed": (
        nn.LogSoftmax(1),
        lambda p: functional.kl_div(p, SOFT, reduction="none").sum(1).mean(),
    ),
    "two sided probabilities": (
        nn.LogSigmoid(),
        lambda p: (
            functional.kl_div(p, SOFT, reduction="sum")
            + functional.kl_div(p.expm1().neg().log(), 1 - SOFT, reduction="sum")
        ),
    ),
    "rows of padding": (
        nn.LogSoftmax(1),
        lambda p: functional.kl_div(p, torch.cat([ONE_HOT[:23], torch.zeros(1, CLASSES)]), reduction="sum"),
    ),
    "mixed labels": (nn.Identity(), lambda z: functional.cross_entropy(z, 0.3 * ONE_HOT + 0.7 * ONE_HOT.flip(0))),
    "a log-softmax twice": (nn.LogSoftmax(1), lambda z: functional.cross_entropy(z, LABELS)),
    "smooth binary targets": (
        nn.Identity(),
        lambda z: functional.binary_cross_entropy_with_logits(z, 0.1 + 0.8 * ONE_HOT),
    ),
    "signs": (nn.Identity(), lambda z: functional.soft_margin_loss(z, 2 * ONE_HOT - 1)),
    "counts": (nn.Identity(), lambda z: functional.poisson_nll_loss(z, 3 * ONE_HOT)),
    "ctc": (nn.Identity(), lambda z: ctc(z, True)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_losses_of_what_they_are_made_for_raise_nothing(name):
    assert not [f for f in said(*RIGHT[name]) if serious(f)]


def test_one_score_for_a_cross_entropy_is_told():
    found = said(nn.Identity(), lambda z: functional.cross_entropy(z, torch.zeros(SAMPLES, dtype=torch.long)), 1)
    assert ["single class" in f.evidence for f in found] == [True]


def test_the_loss_that_is_meant_is_told_beside_the_one_that_is_trained():
    last, loss, _ = WRONG["kl of a softmax"]
    found = said(last, loss)[0]
    assert found.numbers["loss"] < 0 < found.numbers["meant"]


def test_arguments_are_named_as_torch_names_them():
    for name, domain in DOMAINS.items():
        names = list(inspect.signature(getattr(functional, name)).parameters)
        assert names[: len(domain.arguments)] == list(domain.arguments)


def test_a_loss_that_refuses_the_output_is_told_with_what_it_takes():
    with pytest.raises(TraceError, match="binary_cross_entropy_with_logits"):
        said(nn.Identity(), lambda z: functional.binary_cross_entropy(z, ONE_HOT))


def test_a_single_class_beside_another_loss_is_a_fact():
    torch.manual_seed(0)
    model, x, labels = nn.Linear(6, 2), torch.randn(16, 6), torch.randint(2, (16,)).float()

    def loss(out: Tensor) -> Tensor:
        alone = functional.cross_entropy(out[:, 1:], torch.zeros(16, dtype=torch.long))
        return functional.binary_cross_entropy_with_logits(out[:, 0], labels) + alone

    found = [f for f in examine(stabkit.trace(model, x), loss).findings if "single class" in f.evidence]
    assert [f.severity for f in found] == ["info"]
