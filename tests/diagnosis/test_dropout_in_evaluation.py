"""Dropout by a function that does not follow model.eval() is told; what does raises nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit


class Dropping(nn.Module):
    """A hidden layer that is dropped from, by a function or a module."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.head, self.how, self.drop = nn.Linear(16, 32), nn.Linear(32, 3), how, nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).relu()
        if self.how == "module":
            return self.head(self.drop(h))
        following = self.training if self.how == "following" else True
        return self.head(functional.dropout(h, 0.4, following))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("how", "count"), [("always", 1), ("following", 0), ("module", 0)])
def test_dropout_that_goes_on_in_evaluation(how, count, training):
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    report = stabkit.analyze(
        Dropping(how).train(training),
        x,
        loss=lambda out: functional.cross_entropy(out, (x[:, 0] > 0).long()),
        spectrum="none",
    )
    found = [f for f in report.findings if f.severity != "info"]
    assert [f.kind for f in found] == ["dropout"] * count
    assert all("dropout of 40% goes on in evaluation (test_dropout_in_evaluation.py" in f.evidence for f in found)
