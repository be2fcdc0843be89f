"""Models that hold sparse tensors, as the adjacency of a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.tracing.recording.untouched_model import unchanged

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS", "ignore:Sparse B")
LAYOUTS = {
    "coo": lambda a: a.to_sparse(),
    "csr": lambda a: a.to_sparse_csr(),
    "csc": lambda a: a.to_sparse_csc(),
    "bsr": lambda a: a.to_sparse_bsr((2, 2)),
    "bsc": lambda a: a.to_sparse_bsc((2, 2)),
}


class Graph(nn.Module):
    """Layers over the nodes of a graph."""

    def __init__(self, layout: str, writes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        adjacency = torch.rand(10, 10).gt(0.7).float()
        self.register_buffer("adjacency", LAYOUTS[layout](adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)))
        self.layers, self.writes = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), writes

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            values = self.adjacency._values() if self.adjacency.layout == torch.sparse_coo else self.adjacency.values()
            values.mul_(0.5)
        for layer in self.layers:
            x = x + torch.tanh(layer(self.adjacency @ x))
        return x


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_a_model_with_a_sparse_buffer_is_analysed_and_comes_back(layout: str, writes: bool):
    model, x = Graph(layout, writes), torch.randn(10, 8)
    before = model.adjacency.to_dense().clone()
    report = stabkit.analyze(model, x, batch_dim=None, loss=lambda out: out.square().mean(), spectrum="none")
    assert len(report.steps) == 4
    assert torch.equal(model.adjacency.to_dense(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_to_a_sparse_buffer_of_any_layout_comes_back(layout: str):
    model = Graph(layout, False)
    before = model.adjacency.to_dense().clone()
    with unchanged(model):
        held = model.adjacency
        (held._values() if layout == "coo" else held.values()).mul_(3.0)
    assert torch.equal(model.adjacency.to_dense(), before)
