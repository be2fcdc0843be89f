"""Targets that are not finite already: which, where, and boxes of another format beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import serious

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def said(loss: Callable[[Tensor], Tensor]) -> list[stabkit.Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    return [f for f in stabkit.analyze(model, X, loss=loss, spectrum="none").findings if serious(f)]


def sizes(corners: Tensor) -> Tensor:
    width, height = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]
    return torch.stack([corners[:, 0] / 30, corners[:, 1] / 30, torch.log(width / 20), torch.log(height / 20)], 1)


def given() -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.cat([30 * torch.rand(12, 2, generator=g), 12 + 10 * torch.rand(12, 2, generator=g)], 1)


def test_boxes_that_hold_widths_are_named_beside_the_targets_made_of_them():
    boxes = given()
    targets = sizes(boxes)

    def loss(out: Tensor) -> Tensor:
        return functional.smooth_l1_loss(out, targets) * (len(boxes) / 12)

    (found,) = said(loss)
    assert "of targets" in found.evidence
    assert "in columns 2, 3" in found.evidence
    assert "boxes has x2 < x1" in found.evidence
    assert "convert" in found.remedy


def test_corners_are_in_order():
    held = given()
    boxes = torch.cat([held[:, :2], held[:, :2] + held[:, 2:]], 1)
    targets = sizes(boxes)
    assert said(lambda out: functional.smooth_l1_loss(out, targets) * (len(boxes) / 12)) == []


def test_broken_targets_beside_boxes_that_are_in_order_have_no_such_cause():
    held = given()
    boxes = torch.cat([held[:, :2], held[:, :2] + held[:, 2:]], 1)
    targets = sizes(boxes)
    targets[3, 1] = float("inf")
    (found,) = said(lambda out: functional.smooth_l1_loss(out, targets) * (len(boxes) / 12))
    assert "1 infinite of 48 entries, in 1 of 12 rows (3), all in column 1" in found.evidence
    assert "x2" not in found.evidence + found.remedy
