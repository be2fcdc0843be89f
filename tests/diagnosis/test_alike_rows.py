"""Inputs that are the same at every node, position or sample are told where the loss asks for different answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding

NODES = 40


def edges() -> Tensor:
    drawn = torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(0)) < 0.1
    return ((drawn | drawn.T).float() + torch.eye(NODES)).clamp(max=1)


class Graph(nn.Module):
    """Two layers that average every node with its neighbours."""

    averages: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("averages", edges() / edges().sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.averages @ self.second(torch.relu(self.averages @ self.first(x)))


class Decoder(nn.Module):
    """Attention from what is decoded to what was read, with positions or without."""

    def __init__(self, positions: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.head, self.given = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(4, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.positions = nn.Parameter(torch.randn(8, 16)) if positions else None

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        asked, memory = self.given(target), self.read(x) + torch.linspace(-1, 1, x.shape[1])[:, None]
        if self.positions is not None:
            asked = asked + self.positions
        return self.head(torch.relu(self.attention(asked, memory, memory)[0] + asked))


def said(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> list[Finding]:
    lost = functional.mse_loss if targets.is_floating_point() else functional.cross_entropy
    report = stabkit.analyze(model, *inputs, loss=lambda out: lost(out, targets), spectrum="none")
    return [f for f in report.findings if f.severity != "info"]


def labels() -> Tensor:
    return torch.randint(0, 3, (NODES,), generator=torch.Generator().manual_seed(1))


def features() -> Tensor:
    return torch.randn(NODES, 8, generator=torch.Generator().manual_seed(2))


def test_nodes_with_the_same_features() -> None:
    (found,) = said(Graph(), (torch.ones(NODES, 8),), labels())
    assert found.kind == "input_scale"
    assert "the same at all 40 nodes" in found.evidence
    assert "nn.Embedding" in found.remedy
    assert said(Graph(), (features(),), labels()) == []


def test_nodes_with_nearly_the_same_features() -> None:
    z, model = features(), Graph()
    wanted = ((model.averages @ z)[:, 0] > 0).long()
    (found,) = said(model, (1 + 1e-4 * z,), wanted)
    assert "but for 0.0001 of its mean" in found.evidence
    assert "standardise every feature over the nodes" in found.remedy


def test_a_structure_that_is_all_that_is_asked_for() -> None:
    class Degree(Graph):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(edges() @ self.first(x)))[:, :1]

    degrees = edges().sum(1, keepdim=True) / 4 - 1
    assert said(Degree(), (torch.ones(NODES, 8),), degrees) == []


def test_a_decoder_that_is_given_zeros() -> None:
    x = torch.randn(16, 8, 4, generator=torch.Generator().manual_seed(3))
    inputs = x, torch.zeros(16, 8, 4)
    (found,) = said(Decoder(positions=False), inputs, x)
    assert "the same at all 8 positions" in found.evidence
    assert "add positions" in found.remedy
    assert said(Decoder(positions=True), inputs, x) == []


def test_a_reader_that_returns_one_item() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    (found,) = said(model, (features()[:1].repeat(NODES, 1),), labels())
    assert "the same at all 40 samples" in found.evidence
    assert "returns the same item" in found.remedy
