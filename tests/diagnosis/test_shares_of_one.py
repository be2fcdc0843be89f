"""Shares that are 1 whatever they are made of are told with what gets no gradient for it; other shares are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]


def said(model: nn.Module, x: Tensor) -> list[Finding]:
    labels = torch.arange(len(x)) % 3
    found = examine(stabkit.trace(model, x), lambda out: functional.cross_entropy(out, labels)).findings
    return [f for f in found if f.kind == "no_gradient"]


class Experts(nn.Module):
    """A layer of experts, of which a router chooses."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weigh, self.router = weigh, nn.Linear(8, 4)
        self.experts, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.weigh(self.router(x))
        every = torch.stack([expert(x).relu() for expert in self.experts], 1)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, 8))
        return self.head(x + (weights[..., None] * picked).sum(1))


def after(scores: Tensor) -> tuple[Tensor, Tensor]:
    top, chosen = scores.topk(1, -1)
    return top.softmax(-1), chosen


def divided(scores: Tensor) -> tuple[Tensor, Tensor]:
    top, chosen = scores.softmax(-1).topk(1, -1)
    return top / (top.sum(-1, keepdim=True) + 1e-9), chosen


def masked(scores: Tensor) -> tuple[Tensor, Tensor]:
    chosen = scores.argmax(-1, keepdim=True)
    kept = torch.full_like(scores, -math.inf).scatter(-1, chosen, scores.gather(-1, chosen))
    return kept.softmax(-1).gather(-1, chosen), chosen


def before(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.softmax(-1).topk(1, -1)


def two(scores: Tensor) -> tuple[Tensor, Tensor]:
    top, chosen = scores.topk(2, -1)
    return top.softmax(-1), chosen


def saturated(scores: Tensor) -> tuple[Tensor, Tensor]:
    return (1e4 * scores).softmax(-1).topk(1, -1)


@pytest.mark.parametrize("weigh", [after, divided, masked])
def test_weight_of_one_expert(weigh: Weigh) -> None:
    (found,) = said(Experts(weigh), torch.randn(24, 8, generator=torch.Generator().manual_seed(1)))
    assert found.severity == "warning"
    assert "router.weight, router.bias" in found.evidence
    assert "all of them get one" in found.evidence
    assert "softmax over all scores before the choice" in found.remedy


@pytest.mark.parametrize("weigh", [before, two, saturated])
def test_weights_that_are_learnt(weigh: Weigh) -> None:
    found = said(Experts(weigh), torch.randn(24, 8, generator=torch.Generator().manual_seed(1)))
    assert not [f for f in found if "single number" in f.evidence]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_that_torch_divides_by_numbers_inside(smoothing: float) -> None:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    soft = functional.one_hot(torch.arange(24) % 3, 3).float()
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    found = examine(stabkit.trace(Experts(before), x), lambda out: loss(out, soft)).findings
    assert not [f for f in found if "single number" in f.evidence]


class Pooled(nn.Module):
    """A mean over positions, weighed by a softmax along an axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.first, self.score, self.head = dim, nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.first(x).tanh()
        return self.head((self.score(states).softmax(self.dim) * states).sum(1))


def test_softmax_along_an_axis_of_one_entry() -> None:
    x = torch.randn(24, 6, 5, generator=torch.Generator().manual_seed(1))
    (found,) = said(Pooled(-1), x)
    assert found.severity == "warning"
    assert "score.weight" in found.evidence
    assert "dim=-2" in found.remedy
    assert not [f for f in said(Pooled(1), x) if "single number" in f.evidence]


class Attention(nn.Module):
    """One head of self-attention, written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((x + shares @ self.v(x)).mean(1))


def test_attention_among_one_position_is_a_fact() -> None:
    found = said(Attention(), torch.randn(24, 1, 8, generator=torch.Generator().manual_seed(1)))
    assert [f.severity for f in found] == ["info"]


class Mixed(nn.Module):
    """Shares of the positions for every unit, from a bias of its own, as in state-space mixers of images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bias, self.head = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 1)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.first(x).transpose(1, 2)
        return self.head((states * (states.detach() + self.bias).softmax(-1)).sum(-1))


def test_shares_of_one_position_are_a_fact() -> None:
    found = said(Mixed(), torch.randn(24, 1, 8, generator=torch.Generator().manual_seed(1)))
    assert [f.severity for f in found] == ["info"]
