"""Dropout of so much that little is learnt is told, with what is dropped at most; the usual shares are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, apply, examine


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    return x, x[:, :1] + x[:, 1:2].sin()


def said(model: nn.Module, targets: Tensor | None = None) -> list[Finding]:
    x, y = batch()
    found = examine(stabkit.trace(model, x), lambda out: functional.mse_loss(out, y if targets is None else targets))
    return [f for f in found.findings if f.kind == "dropout"]


def hidden(share: float) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24), nn.ReLU(), nn.Dropout(share), nn.Linear(24, 24), nn.ReLU(), nn.Dropout(share)]
    return nn.Sequential(*layers, nn.Linear(24, 1))


class ByFunction(nn.Module):
    """Features that are dropped by a call of the function."""

    def __init__(self, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.share, self.layers = share, nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(functional.dropout(x, p=self.share, training=self.training))


@pytest.mark.parametrize("model", [hidden(0.9), ByFunction(0.8)])
def test_too_much_is_told(model: nn.Module) -> None:
    (found,) = said(model)
    assert found.severity == "warning"
    assert "tried on a copy: with no more than" in found.evidence
    assert "p is the share that is set to zero" in found.remedy


def test_the_remedy_sets_the_share() -> None:
    model = hidden(0.9)
    (found,) = said(model)
    apply(model, found)
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [found.numbers["less"]] * 2
    assert said(model) == []


@pytest.mark.parametrize("model", [hidden(0.5), ByFunction(0.2), hidden(0.9).eval()])
def test_usual_shares_and_none_raise_nothing(model: nn.Module) -> None:
    assert said(model) == []


def test_what_is_denoised_is_dropped_on_purpose() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
    assert said(model, batch()[0]) == []
