"""Nodes of a graph that became alike but for their degrees are a collapse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import examine


def adjacency(nodes: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    links = (torch.rand(nodes, nodes, generator=generator) < 0.2).float()
    links[:, 0] = 1.0  # one hub, so that degrees differ
    links = ((links + links.T + torch.eye(nodes)) > 0).float()
    degrees = links.sum(1)
    return links / (degrees[:, None] * degrees[None]).sqrt()


class Layer(nn.Module):
    """Averages over neighbours, then an orthogonal matrix."""

    def __init__(self, S: Tensor, skip: bool) -> None:
        super().__init__()
        self.linear, self.skip = nn.Linear(8, 8, bias=False), skip
        nn.init.orthogonal_(self.linear.weight)
        self.register_buffer("S", S)

    def forward(self, h: Tensor) -> Tensor:
        z = self.S @ self.linear(h)
        return h + 0.3 * z if self.skip else z


@pytest.mark.parametrize("batch_dim", [0, None])
def test_nodes_become_alike_without_a_skip_and_not_with_one(batch_dim):
    torch.manual_seed(0)
    S, x = adjacency(), torch.randn(30, 8)
    for skip, collapses in ((False, True), (True, False)):
        model = nn.Sequential(*[Layer(S, skip) for _ in range(16)])
        found = examine(stabkit.trace(model, x, batch_dim=batch_dim)).findings
        assert any(f.kind == "rank_collapse" for f in found) == collapses


class Edges(nn.Module):
    """A mean over the edges that lead to a node, then a matrix."""

    def __init__(self, S: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.source, self.target = S.nonzero().T
        self.degree = (S > 0).sum(1, keepdim=True)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, h: Tensor) -> Tensor:
        messages = self.linear(h).index_select(0, self.source)
        return torch.zeros_like(h).index_add(0, self.target, messages) / self.degree


class Sparse(Layer):
    """The product with a sparse matrix."""

    def __init__(self, S: Tensor) -> None:
        super().__init__(S, False)

    def forward(self, h: Tensor) -> Tensor:
        return torch.sparse.mm(self.S.to_sparse(), self.linear(h))


class Attending(nn.Module):
    """Tokens that an attention without a skip makes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, h: Tensor) -> Tensor:
        z = self.linear(h)
        return (z @ z.transpose(-2, -1) / 8**0.5).softmax(-1) @ z


def collapses(model: nn.Module, x: Tensor) -> list[str]:
    found = examine(stabkit.trace(model, x, batch_dim=None)).findings
    return [f.evidence for f in found if f.kind == "rank_collapse"]


@pytest.mark.parametrize("layer", [lambda S: Layer(S, False), Edges, Sparse])
def test_averages_over_neighbours_are_named(layer):
    torch.manual_seed(0)
    S = adjacency()
    (said,) = collapses(nn.Sequential(*[layer(S) for _ in range(16)]), torch.randn(30, 8))
    assert said.startswith("oversmoothing: 16 ")
    assert "tells the nodes of the graph apart falls" in said


def test_tokens_that_attend_are_no_nodes():
    torch.manual_seed(0)
    (said,) = collapses(nn.Sequential(*[Attending() for _ in range(16)]), torch.randn(30, 8))
    assert "oversmoothing" not in said
