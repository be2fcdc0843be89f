"""A loss that an output cannot bring far down, whatever the weights are, is said with the floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.losses.ranges import range_of

LABELS = torch.arange(40) % 10
PAIRED = torch.arange(40)
NOISE = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))


def inputs() -> Tensor:
    return torch.randn(40, 20, generator=torch.Generator().manual_seed(1))


class Pairs(nn.Module):
    """Cosines of two views of every sample, times a scale."""

    def __init__(self, scale: Callable[[Tensor], Tensor], start: float, trained: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(20, 64), nn.Linear(20, 64)
        self.size, self.scale = nn.Parameter(torch.tensor(start), requires_grad=trained), scale

    def forward(self, x: Tensor) -> Tensor:
        a, b = functional.normalize(self.one(x), dim=-1), functional.normalize(self.two(x), dim=-1)
        return self.scale(self.size) * a @ b.T


class Similar(Pairs):
    """The same by `cosine_similarity`."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        return self.scale(self.size) * functional.cosine_similarity(a[:, None], b[None], dim=-1)


def contrastive(out: Tensor) -> Tensor:
    return (functional.cross_entropy(out, PAIRED) + functional.cross_entropy(out.T, PAIRED)) / 2


def label(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, LABELS)


def ended(last: nn.Module, size: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, size), last)


def said(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, inputs()), loss).findings if f.kind == "loss"]


@pytest.mark.parametrize("kind", [Pairs, Similar])
def test_a_trained_scale_that_is_too_small_is_named(kind):
    (found,) = said(kind(lambda s: s, 2.66), contrastive)
    assert found.severity == "warning"
    assert found.numbers["floor"] == pytest.approx(math.log1p(39 * math.exp(-2.66 * 40 / 39)), rel=1e-4)
    assert "while size is that" in found.evidence
    assert "multiply by its exp" in found.remedy
    assert [action["parameter"] for action in found.actions] == ["size"]


def test_the_floor_of_paired_cosines_is_reached_by_a_simplex():
    corners = torch.eye(40, dtype=torch.float64) - 1 / 40
    corners = functional.normalize(corners, dim=1).requires_grad_()
    loss = contrastive(2.66 * functional.normalize(corners, dim=1) @ functional.normalize(corners, dim=1).T)
    assert float(loss.detach()) == pytest.approx(math.log1p(39 * math.exp(-2.66 * 40 / 39)))


def test_classes_told_by_a_tanh_have_a_floor():
    (found,) = said(ended(nn.Tanh(), 10), label)
    assert (found.severity, found.module_path) == ("warning", "3")
    assert found.numbers["floor"] == pytest.approx(math.log1p(9 * math.exp(-2)))
    assert "take the tanh away" in found.remedy


def test_a_temperature_that_was_chosen_is_a_fact_to_know():
    (found,) = said(Pairs(lambda s: s, 2.0, trained=False), contrastive)
    assert (found.severity, found.actions) == ("info", ())


HEALTHY_LOGITS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "the exponential of a logarithm": (Pairs(torch.exp, 2.66), contrastive),
    "a scale of 16 for ten classes": (nn.Sequential(ended(nn.Tanh(), 10), nn.Linear(10, 10)), label),
    "logits": (ended(nn.Identity(), 10), label),
}


@pytest.mark.parametrize("name", HEALTHY_LOGITS)
def test_logits_that_can_be_sharp_are_no_fault(name):
    assert said(*HEALTHY_LOGITS[name]) == []


# the last module, the loss, the share of targets beyond its range, whether the finding is expected at its path
BEYOND: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], float]] = {
    "noise by a relu": (nn.ReLU(), lambda out: functional.mse_loss(out, NOISE), float((NOISE < 0).double().mean())),
    "large numbers by a sigmoid": (nn.Sigmoid(), lambda out: (out - (5 + 2 * NOISE)).pow(2).mean(), 1.0),
    "absolute errors of a tanh": (nn.Tanh(), lambda out: (3 * NOISE - out).abs().mean(), 0.7),
    "smooth errors of a softplus": (nn.Softplus(), lambda out: functional.smooth_l1_loss(out, NOISE), 0.5),
}


@pytest.mark.parametrize("name", BEYOND)
def test_targets_beyond_the_range_of_the_output_are_counted(name):
    last, loss, share = BEYOND[name]
    (found,) = said(ended(last, 6), loss)
    assert (found.severity, found.module_path) == ("warning", "3")
    assert found.numbers["outside"] == pytest.approx(share, abs=0.08)
    assert "at the end away" in found.remedy
    assert "steps of plain SGD take the loss" in found.evidence  # whichever of the two it speaks for


WITHIN: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "positive targets of a relu": (nn.ReLU(), lambda out: functional.mse_loss(out, NOISE.abs())),
    "a little noise below zero": (nn.ReLU(), lambda out: functional.mse_loss(out, NOISE.abs() - 0.02)),
    "shares by a sigmoid": (nn.Sigmoid(), lambda out: functional.l1_loss(out, NOISE.sigmoid())),
    "noise by a linear layer": (nn.Identity(), lambda out: functional.mse_loss(out, NOISE)),
    "noise by a gelu, which is not monotone": (nn.GELU(), lambda out: functional.mse_loss(out, NOISE)),
    "a size that is squared": (nn.ReLU(), lambda out: out.pow(2).mean()),
}


@pytest.mark.parametrize("name", WITHIN)
def test_targets_within_reach_are_no_fault(name):
    last, loss = WITHIN[name]
    assert said(ended(last, 6), loss) == []


def test_ranges_follow_what_bounds_and_stop_at_what_does_not():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    unit = functional.normalize(x, dim=-1)
    cases = [
        (3 * x.tanh(), (-3.0, 3.0)),
        (-(x.sigmoid() / 2).T, (-0.5, 0.0)),
        (x.clamp(-1, 4).reshape(2, 6), (-1.0, 4.0)),
        (x.softmax(1) * 10, (0.0, 10.0)),
        (5 * unit @ unit.T, (-5.0, 5.0)),
        (x / x.norm(dim=-1, keepdim=True) @ unit.T, (-1.0, 1.0)),
        (unit.T @ unit, (-math.inf, math.inf)),  # normalised along the other dimension
        ((unit * unit.flip(0)).sum(-1), (-1.0, 1.0)),
        ((unit * unit.flip(0)).sum(), (-math.inf, math.inf)),
        ((unit * unit.flip(0)).sum(0), (-math.inf, math.inf)),
        (2 * functional.cosine_similarity(x, torch.ones(4, 3)), (-2.0, 2.0)),
        (x.tanh() + x, (-math.inf, math.inf)),
        (x @ x.T, (-math.inf, math.inf)),
        (functional.gelu(x), (-math.inf, math.inf)),
        (x.relu(), (0.0, math.inf)),
    ]
    for tensor, (low, high) in cases:
        held = range_of(tensor.grad_fn)
        assert (held.low, held.high) == pytest.approx((low, high)), tensor.grad_fn


YES = (NOISE[:, :1] > 0).double().float()


SOME = torch.rand(40, 1, generator=torch.Generator().manual_seed(9))
#: how binary_cross_entropy_with_logits is called
BINARY: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "classes": (YES, {}),
    "probabilities": (0.05 + 0.9 * YES, {}),
    "weighted positives": (YES, {"pos_weight": torch.tensor([5.0])}),
    "weights, of which some are zero": (YES, {"weight": (SOME - 0.3).clamp_min(0)}),
    "a sum": (YES, {"reduction": "sum", "weight": SOME, "pos_weight": torch.tensor([0.2])}),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(("last", "low", "high"), [(nn.ReLU(), 0.0, 40.0), (nn.Tanh(), -1.0, 1.0)])
def test_the_floor_of_held_logits_is_the_least_that_any_of_them_cost(name, last, low, high):
    """Every logit tried by itself over its range, and one for all over all numbers."""
    targets, given = BINARY[name]

    def loss(out: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(out, targets.to(out.dtype), **given)

    def least(tried: Tensor) -> Tensor:
        apart = given | {"reduction": "none"}
        wide = tried.expand(40, -1)
        return functional.binary_cross_entropy_with_logits(wide, targets.double().expand_as(wide), **apart)

    (found,) = said(ended(last, 1), loss)
    by = torch.sum if given.get("reduction") == "sum" else torch.mean
    held = by(least(torch.linspace(low, high, 40_001, dtype=torch.float64)[None]).amin(1))
    alike = by(least(torch.linspace(-30, 30, 6001, dtype=torch.float64)[None]), 0).min()
    assert found.numbers["floor"] == pytest.approx(float(held), rel=1e-6)
    assert found.numbers["chance"] == pytest.approx(float(alike), rel=1e-3)
    assert "before the loss away" in found.remedy
    assert found.actions


def test_binary_targets_that_are_probabilities_or_left_out_are_no_fault():
    plain = ended(nn.Identity(), 1)
    bce = functional.binary_cross_entropy_with_logits
    assert said(plain, lambda out: bce(out, NOISE[:, :1].sigmoid())) == []
    assert said(plain, lambda out: bce(out, YES * 0.9 + 0.05, pos_weight=torch.tensor([3.0]))) == []
    left_out = YES.clone()
    left_out[:10] = -1
    assert said(plain, lambda out: (bce(out, left_out, reduction="none") * (left_out >= 0)).mean()) == []
    assert said(plain, lambda out: bce(out, left_out, weight=(left_out >= 0).float())) == []
    assert said(ended(nn.ReLU(), 1), lambda out: bce(out, torch.ones(40, 1))) == []


def squared(out: Tensor) -> Tensor:
    difference = out - NOISE
    return (difference * difference).mean()


@pytest.mark.parametrize("loss", [squared, lambda out: (out - NOISE).cosh().log().mean()])
def test_errors_by_other_even_functions_are_held_against_the_range_too(loss):
    (found,) = said(ended(nn.Softplus(), 6), loss)
    assert found.numbers["outside"] == pytest.approx(0.5, abs=0.08)


def test_scores_of_classes_that_a_relu_cuts_off_are_told_where_training_gains_without_it():
    model = ended(nn.ReLU(), 10)
    with torch.no_grad():
        model[2].bias.sub_(0.5)
    (found,) = said(model, label)
    assert "none below zero" in found.evidence
    assert found.actions
    assert not said(ended(nn.Identity(), 10), label)
