"""Nodes that get nothing from their neighbours, nor from themselves, are told where that does harm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding

NODES, LINKED = 60, 40


class Product(nn.Module):
    """Products with a fixed matrix of which some rows are empty, or hold a loop."""

    matrix: Tensor

    def __init__(self, loops: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        drawn = (torch.rand(NODES, NODES) < 0.1).float()
        drawn[LINKED:] = 0
        drawn[:, LINKED:] = 0
        matrix = drawn + torch.eye(NODES) if loops else drawn
        self.register_buffer("matrix", matrix / matrix.sum(1, keepdim=True).clamp(min=1))
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix @ self.second(torch.relu(self.matrix @ self.first(x)))


class Messages(nn.Module):
    """Sums over edges, beside the state of the node itself or alone."""

    def __init__(self, loops: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edges = torch.randint(0, LINKED, (2, 150))
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.own = nn.Linear(8, 16) if loops else None

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        h = torch.zeros(NODES, 16).index_add(0, target, self.first(x)[source])
        h = torch.relu(h if self.own is None else h + self.own(x))
        summed = torch.zeros(NODES, 16).index_add(0, target, self.second(h)[source])
        return self.head(torch.relu(summed if self.own is None else summed + h))


def said(model: nn.Module) -> list[Finding]:
    x = torch.randn(NODES, 8, generator=torch.Generator().manual_seed(1))
    labels = (x[:, 0] > 0).long()
    report = stabkit.analyze(model, x, loss=lambda out: functional.cross_entropy(out, labels), spectrum="none")
    return [f for f in report.findings if f.severity != "info"]


@pytest.mark.parametrize("kind", [Product, Messages])
def test_nodes_without_neighbours(kind: type[nn.Module]) -> None:
    (found,) = said(kind(loops=False))
    assert found.kind == "no_influence"
    assert "of 60 nodes get nothing from the sums over neighbours (test_empty_nodes.py:" in found.evidence
    assert "self-loops" in found.remedy
    assert said(kind(loops=True)) == []


def test_a_mask_that_is_zero_everywhere() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 2)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            summed = (self.embed(tokens) * mask[..., None]).sum(1)
            return self.head(summed / mask.sum(1, keepdim=True).clamp(min=1))

    tokens = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 0] % 2
    report = stabkit.analyze(
        Masked(), tokens, torch.zeros(16, 6), loss=lambda out: functional.cross_entropy(out, labels), spectrum="none"
    )
    (found,) = [f for f in report.findings if f.severity != "info"]
    assert found.kind == "no_gradient"
    assert "multiplies by a constant of 96 zeros" in found.evidence
