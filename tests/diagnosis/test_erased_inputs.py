"""Normalisations over one value, or two, are named and given more to normalise over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import apply, examine
from tests.diagnosis.confusion import serious


class Entries(nn.Module):
    """Every entry of a hidden layer normalised by itself."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), norm, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x)).unsqueeze(-1)).squeeze(-1))


def pooled(groups: int, channels: int = 16) -> nn.Module:
    """A GroupNorm on maps of one pixel."""
    body = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1)]
    return nn.Sequential(*body, nn.GroupNorm(groups, channels), nn.ReLU(), nn.Flatten(), nn.Linear(channels, 3))


def layered(groups: int) -> nn.Module:
    """GroupNorms on vectors."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.GroupNorm(groups, 16), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, 16), *layers, nn.Linear(16, 3))


def scored(last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1), last)


def inputs(model: nn.Module) -> Tensor:
    images = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Conv2d)
    return torch.randn(*((12, 3, 6, 6) if images else (12, 6)), generator=torch.Generator().manual_seed(1))


def loss(out: Tensor) -> Tensor:
    return nn.functional.mse_loss(out, torch.linspace(0, 1, out.numel()).view_as(out))


@pytest.mark.parametrize("of", [None, loss], ids=["no loss", "loss"])
@pytest.mark.parametrize(
    ("make", "place", "values", "words"),
    [
        (lambda: pooled(16), "4", 1, "GroupNorm(2, 16) at 4, 8 values per group"),
        (lambda: pooled(8), "4", 2, "GroupNorm(2, 16) at 4, 8 values per group"),
        (lambda: layered(16), "2", 1, "GroupNorm(2, 16) at 2"),
        (lambda: Entries(nn.LayerNorm(1)), "norm", 1, "take norm out"),
        (lambda: Entries(nn.RMSNorm(1)), "norm", 1, "take norm out"),
        (lambda: scored(nn.Softmax(dim=1)), "5", 1, "sigmoid"),
    ],
    ids=["pixel", "two of a pixel", "vectors", "layer norm", "rms norm", "softmax"],
)
def test_what_a_norm_over_too_few_values_erases_is_named_and_mended(make, place, values, words, of):
    torch.manual_seed(0)
    model = make()
    flow = stabkit.trace(model, inputs(model))
    (found,) = serious(examine(flow, of))
    assert (found.kind, found.module_path, found.numbers["values"]) == ("rank_collapse", place, values)
    assert words in found.remedy
    assert "tried on a copy" in found.evidence
    apply(model, found)
    assert serious(examine(flow.again(), of)) == []


class Gate(nn.Module):
    """A map of one channel that a transformer of width 1 refines, beside a skip: the attention of CSATv2 in timm."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.score, self.norm, self.mlp, self.skip = nn.Linear(6, 6), nn.LayerNorm(1), nn.Linear(1, 1), skip

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        refined = self.mlp(self.norm(score.unsqueeze(-1))).squeeze(-1)
        return x + x * (score + refined if self.skip else refined)


@pytest.mark.parametrize(("skip", "severity"), [(True, "info"), (False, "warning")])
def test_what_is_erased_beside_a_skip_cuts_nothing_off(skip: bool, severity: str):
    torch.manual_seed(0)
    model = nn.Sequential(*(Gate(skip) for _ in range(3)))
    (found,) = [f for f in examine(stabkit.trace(model, torch.randn(12, 6))).findings if "normalises" in f.evidence]
    assert (found.kind, found.severity, found.module_path) == ("rank_collapse", severity, "0.norm")
    assert ("carried on beside" in found.evidence) is skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: pooled(4),
        lambda: layered(4),
        lambda: scored(nn.Sigmoid()),
        lambda: Entries(nn.Identity()),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ],
)
def test_norms_over_enough_values_and_attention_to_a_single_key_are_left_alone(make):
    torch.manual_seed(0)
    model = make()
    x = inputs(model)
    given = (x[:, None, [0, 1, 2, 3, 4, 5, 0, 1]],) * 3 if isinstance(model, nn.MultiheadAttention) else (x,)
    found = examine(stabkit.trace(model, *given)).findings
    assert not any("normalises over" in f.evidence or "softmax" in f.evidence for f in found)
