"""Of the scalings of a large input, that which trains best is told first."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import serious


@pytest.mark.parametrize(("uneven", "begins"), [(True, "standardise every feature"), (False, "divide the input")])
def test_features_of_unlike_sizes_are_standardised_and_others_divided(uneven: bool, begins: str):
    torch.manual_seed(0)
    x = torch.randn(160, 8)
    labels = (x[:, :3] + 0.1 * torch.randn(160, 3)).argmax(1)
    x = x * (torch.tensor([1.0, 1, 1, 1, 1, 1, 900, 900]) if uneven else 300.0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    report = stabkit.analyze(model, x, loss=lambda out: functional.cross_entropy(out, labels), spectrum="none")
    (found,) = [f for f in report.findings if serious(f) and "the input has the size" in f.evidence]
    assert found.remedy.startswith(begins)
