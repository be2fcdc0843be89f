"""Losses that are flat above their least are told with what ends the gradient; satisfied ones are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

Loss = Callable[[Tensor], Tensor]


class Boxes(nn.Module):
    """Boxes in one corner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x).sigmoid()
        return torch.cat([0.3 * y[:, :2], 0.3 * y[:, :2] + 0.1 + 0.1 * y[:, 2:]], 1)


def batch() -> Tensor:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(1))


def targets(far: int) -> Tensor:
    corners = 0.2 * torch.rand(24, 2, generator=torch.Generator().manual_seed(2))
    corners[:far] += 0.5
    return torch.cat([corners, corners + 0.25], 1)


def overlap(boxes: Tensor, wanted: Tensor) -> Tensor:
    sides = (torch.min(boxes[:, 2:], wanted[:, 2:]) - torch.max(boxes[:, :2], wanted[:, :2])).clamp(min=0)
    common = sides[:, 0] * sides[:, 1]
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, wanted)]
    return common / (areas[0] + areas[1] - common + 1e-7)


def said(loss: Loss, model: nn.Module | None = None) -> list[Finding]:
    found = examine(stabkit.trace(model or Boxes(), batch()), loss).findings
    return [f for f in found if f.kind == "loss" and f.severity != "info"]


@pytest.mark.parametrize(("far", "severity"), [(24, "critical"), (18, "warning")])
def test_boxes_that_do_not_meet(far: int, severity: str) -> None:
    (found,) = said(lambda out: (1 - overlap(out, targets(far))).mean())
    assert found.severity == severity
    assert "it ends at clamp (overlap, test_flat_losses.py:" in found.evidence
    assert "GIoU" in found.remedy


def test_boxes_that_meet() -> None:
    assert said(lambda out: (1 - overlap(out, targets(0))).mean()) == []


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


LABELS = torch.arange(24) % 2


def test_a_clamp_with_targets_beyond_it() -> None:
    (found,) = said(lambda out: (out.clamp(5, 9).sum(1) - LABELS).square().mean(), classifier())
    assert found.severity == "critical"
    assert "clamp (test_flat_losses.py:" in found.evidence
    assert "5 + 4 * sigmoid(x)" in found.remedy


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: functional.cross_entropy(out, LABELS, reduction="none").topk(4).values.mean(),
        lambda out: functional.cross_entropy(out, LABELS.where(torch.arange(24) < 4, -100)),
        lambda out: functional.relu(1 - 1e6 * (2 * LABELS - 1) * (out[:, 1] - out[:, 0])).mean(),
    ],
    ids=["hardest of a batch", "labels that are ignored", "beyond a margin"],
)
def test_samples_that_are_satisfied_or_left_out(loss: Loss) -> None:
    assert not [f for f in said(loss, classifier()) if "no gradient by the outputs" in f.evidence]


def test_probabilities_that_are_certain_and_right() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.Hardsigmoid())
    labels = (model(batch()) > 0.5).to(torch.float32)
    with torch.no_grad():
        model[0].weight.mul_(100), model[0].bias.mul_(100)
    assert said(lambda out: functional.binary_cross_entropy(out, labels), model) == []
