"""A softmax that is written out and overflows is named as what it is, also where its NaN spoils the chain of steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import examine

LABELS = torch.arange(64) % 3
INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 1, 1, 1, 60, 120.0])


class Policy(nn.Module):
    """Scores and a softmax of them, or its logarithm, made in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.way = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 3)), way

    def forward(self, x: Tensor) -> Tensor:
        s = 12 * self.body(x)
        if self.way == "whole":
            return s.log_softmax(1)
        if self.way == "largest":
            s = s - s.amax(1, keepdim=True)
        e = torch.exp(s)
        p = e / (e.sum(1, keepdim=True) + (1e-8 if self.way == "eps" else 0.0))
        return p if self.way == "probabilities" else torch.log(p + (1e-8 if self.way == "eps" else 0.0))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("plain", "take log_softmax"),
        ("eps", "take log_softmax"),
        ("largest", "take log_softmax"),
        ("probabilities", "torch.softmax"),
    ],
)
def test_a_softmax_that_is_written_out_is_named(way, words):
    def loss(out: Tensor) -> Tensor:
        return (out[torch.arange(64), LABELS] - 1).square().mean() if way == "probabilities" else nll(out)

    found = examine(stabkit.trace(Policy(way), INPUTS), loss)
    assert found.verdict.name == "non-finite"
    assert words in found.findings[0].remedy


def nll(out: Tensor) -> Tensor:
    return functional.nll_loss(out, LABELS)


def test_without_a_loss_it_is_named_as_well():
    found = examine(stabkit.trace(Policy("plain"), INPUTS))
    assert "take log_softmax" in found.findings[0].remedy


def test_the_whole_function_raises_nothing():
    found = examine(stabkit.trace(Policy("whole"), INPUTS), nll)
    assert "non_finite" not in [f.kind for f in found.findings]
