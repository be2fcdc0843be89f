"""Updates that learn nothing, by their rate or by weight decay, and rates that throw a loss far away for a while."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding
from stabkit.errors import ArgumentError


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def said(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: Any) -> list[Finding]:
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    x, y = batch or (x, (x[:, 0] * x[:, 1] > 0).long())
    report = stabkit.analyze(
        model, x, loss=lambda out: functional.cross_entropy(out, y), optimizer=optimizer, spectrum="none"
    )
    return [f for f in report.findings if f.severity != "info"]


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.SGD, 1e-7), (torch.optim.Adam, 1e-9)])
def test_a_rate_that_moves_nothing(kind: Any, rate: float) -> None:
    model, x = classifier(), torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    (found,) = said(model, kind(model.parameters(), lr=rate), x, (x[:, 0] > 0).long())
    assert found.kind == "idle_update"
    assert f"the learning rate {rate:.3g}" in found.evidence
    assert "raise the learning rate" in found.remedy


def test_rates_that_a_schedule_raises() -> None:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-6 + step / 100)
    assert said(model, optimizer) == []


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.Adam, 1e-3), (torch.optim.SGD, 1e-2)])
def test_a_decay_that_takes_everything_back(kind: Any, rate: float) -> None:
    model, x = classifier(), torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    (found,) = said(model, kind(model.parameters(), lr=rate, weight_decay=1.0), x, (x[:, 0] > 0).long())
    assert found.kind == "idle_update"
    assert "the weight decay 1 of " in found.evidence
    assert "lower weight_decay" in found.remedy


@pytest.mark.parametrize(
    ("kind", "decay"),
    [(torch.optim.Adam, 1e-4), (torch.optim.AdamW, 0.1), (torch.optim.SGD, 5e-4)],
)
def test_usual_decays(kind: Any, decay: float) -> None:
    model = classifier()
    assert said(model, kind(model.parameters(), lr=1e-3, weight_decay=decay)) == []


def test_a_rate_that_throws_the_loss_far_away() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * 49, 64), nn.ReLU(), nn.Linear(64, 4)),
    )
    x, y = torch.randn(32, 1, 16, 16), torch.randint(0, 4, (32,))
    (found,) = said(model, torch.optim.Adam(model.parameters(), lr=0.3), x, y)
    assert found.kind == "unstable_update"
    assert found.numbers["proposed_rate"] < 0.1
    assert said(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, y) == []


def test_a_layer_that_was_replaced_after_the_optimizer_was_made() -> None:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    model[4] = nn.Linear(64, 2)
    with pytest.raises(ArgumentError, match=r"not 4\.weight, 4\.bias of the model: these never move"):
        said(model, optimizer)
