"""Saturated attention is named; sharp heads of a healthy layer, masks and class probabilities are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Thresholds
from stabkit.diagnosis.states.attention import attention_findings, attentions


class Attention(nn.Module):
    """One head, written out."""

    def __init__(self, size: float, causal: bool = False, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.q.weight.data.mul_(size)
        self.causal, self.fused = causal, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        scores = q @ k.transpose(1, 2) / 4
        if self.causal:
            scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
        return scores.softmax(-1) @ v


class Library(nn.Module):
    """The module of torch."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mha.in_proj_weight.data[:32] *= size

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


def flow(model: nn.Module) -> stabkit.Flow:
    return stabkit.trace(model, torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1)), check=False)


MODELS = [
    lambda size: Attention(size),
    lambda size: Attention(size, causal=True),
    lambda size: Attention(size, fused=True),
    lambda size: Library(math.sqrt(size)),
]


@pytest.mark.parametrize("make", MODELS)
def test_saturated_attention_is_named_with_its_entropy(make):
    (found,) = attention_findings(flow(make(1e4)), Thresholds())
    assert (found.kind, found.severity) == ("saturated", "warning")
    assert "no gradient gets back to queries and keys" in found.evidence
    assert found.numbers["entropy"] < 0.05
    assert "norm on q and k" in found.remedy


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("size", [0.0, 1.0, 3.0])
def test_attention_that_spreads_its_weight_is_silent(make, size):
    model = flow(make(size))
    assert len(attentions(model)) == 1
    assert attention_findings(model, Thresholds()) == []


def test_class_probabilities_are_no_attention():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))
    model[0].weight.data.mul_(1e4)
    assert attentions(flow(model)) == []
