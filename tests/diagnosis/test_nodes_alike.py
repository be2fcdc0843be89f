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
