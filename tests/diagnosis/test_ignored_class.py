"""A class of the outputs that a cross entropy ignores is told, and no padding of tokens, or number that is no class."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


@pytest.mark.parametrize(("ignored", "count"), [(0, 1), (-100, 0), (3, 0)])
def test_a_class_that_samples_have_is_ignored(ignored, count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = stabkit.analyze(
        model, X, loss=lambda out: functional.cross_entropy(out, Y, ignore_index=ignored), spectrum="none"
    )
    found = [f for f in report.findings if f.severity != "info"]
    assert [f.kind for f in found] == ["loss"] * count
    assert all(f"{int((Y == 0).sum())} of 64 labels are 0" in f.evidence for f in found)


def test_padding_of_tokens_is_ignored_on_purpose():
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (64,), generator=torch.Generator().manual_seed(1))
    labels = torch.where(tokens > 6, 0, tokens)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9))
    report = stabkit.analyze(
        model, tokens, loss=lambda out: functional.cross_entropy(out, labels, ignore_index=0), spectrum="none"
    )
    assert not [f for f in report.findings if "ignore_index" in f.evidence]
