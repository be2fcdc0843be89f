"""A gradient that is not finite counts where it reaches a parameter, or an input whose gradient is asked for."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import serious


class Standardised(nn.Module):
    """Inputs over their own deviation, some of which are silent: the derivative of their root is infinite."""

    def __init__(self, before: bool = False) -> None:
        super().__init__()
        self.front = nn.Conv1d(4, 4, 1, groups=4, bias=False) if before else nn.Identity()
        self.layer, self.head = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.front(x)
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-4)
        return self.head(torch.relu(self.layer(x)).mean(2))


def analysed(model, *, asked=False):
    torch.manual_seed(0)
    x, labels = torch.randn(9, 4, 12), torch.arange(9) % 3
    x[:, 3] = 0.0
    return stabkit.analyze(
        model, x.requires_grad_(asked), loss=lambda out: functional.cross_entropy(out, labels), spectrum="none"
    )


def test_before_the_first_parameter_it_is_a_fact():
    torch.manual_seed(0)
    report = analysed(Standardised())
    assert report.verdict == "not judged"
    assert not any(map(serious, report.findings))
    assert any(f.kind == "non_finite" and "no parameter lies before it" in f.evidence for f in report.findings)


def test_where_a_parameter_or_the_caller_meets_it_it_is_critical():
    torch.manual_seed(0)
    assert analysed(Standardised(before=True)).verdict == "non-finite"
    report = analysed(Standardised(), asked=True)
    assert report.verdict == "non-finite"
    assert any(f.kind == "non_finite" and f.severity == "critical" for f in report.findings)
