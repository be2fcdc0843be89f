"""Scans whose factor nothing keeps below 1 are told with what is to be bounded; those that are bounded are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, Thresholds, apply
from stabkit.diagnosis.over_time.findings import time_findings
from stabkit.diagnosis.over_time.scans import held_below_one


class Scan(nn.Module):
    """h' = exp(-A dt) h + u, with a step size that is a parameter, or made of the input."""

    def __init__(self, selective: bool = False, bounded: bool = False, sign: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.selective, self.bounded = selective, bounded
        self.into, self.out = nn.Linear(4, 12), nn.Linear(12, 2)
        self.A = nn.Parameter(sign * (torch.rand(12) + 0.1))
        self.dt = nn.Linear(4, 12) if selective else nn.Parameter(0.4 * torch.randn(12))

    def factor(self, x: Tensor) -> Tensor:
        dt = self.dt(x) if self.selective else self.dt
        return torch.exp(-self.A * (functional.softplus(dt - 2) if self.bounded else dt))

    def forward(self, x: Tensor) -> Tensor:
        u = self.into(x)
        state = torch.zeros_like(u[:, 0])
        for t in range(x.shape[1]):
            state = self.factor(x[:, t]) * state + 0.3 * u[:, t]
        return self.out(state)


class Bare(Scan):
    """h' = a h + u, with a decay that is a parameter itself."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        del self.dt
        self.A = nn.Parameter(decay + 0.2 * torch.randn(12))

    def factor(self, _x: Tensor) -> Tensor:
        return self.A


def said(model: nn.Module, times: int = 40) -> list[Finding]:
    x = torch.randn(16, times, 4, generator=torch.Generator().manual_seed(1))
    labels = (x[:, -3:, 0].sum(1) > 0).long()
    flow = stabkit.trace(model, x, check=False)
    found = time_findings(flow, lambda out: functional.cross_entropy(out, labels), Thresholds())
    return [f for f in found if f.kind == "exploding" and f.severity != "info"]


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (Scan(), "keep dt positive"),
        (Scan(selective=True), "put a softplus behind dt"),
        (Bare(1.05), "keep A below 1 in size"),
    ],
)
def test_what_is_to_be_bounded_is_told_and_helps(model: nn.Module, word: str) -> None:
    (found,) = said(model)
    assert found.remedy.startswith(word)
    assert "nothing bounds" in found.evidence
    assert "tried on a copy" in found.evidence
    apply(model, found)
    assert said(model) == []


def test_growth_within_the_limits_is_told_where_training_is_better_without() -> None:
    model = Scan(sign=-1.0)
    model.dt.data.fill_(0.1)
    (found,) = said(model, times=60)
    assert found.numbers["growth_over_time"] < Thresholds().explosion
    assert found.remedy.startswith("keep A positive")
    assert "steps of plain SGD" in found.evidence


@pytest.mark.parametrize("model", [Scan(bounded=True), Scan(selective=True, bounded=True), Bare(0.6)])
def test_scans_that_are_bounded_raise_nothing(model: nn.Module) -> None:
    assert said(model) == []


def test_a_factor_below_minus_one_is_of_a_long_step() -> None:
    assert held_below_one(Scan(), "", ["dt"], (-1.5, 1.2)) == []
