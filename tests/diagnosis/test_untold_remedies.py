"""What helps deep stacks only with Adam, or only round blocks that take a second argument, is tried and told."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import examine, treat
from stabkit.diagnosis.finding import serious


class Layer(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.lin = nn.Linear(given, made)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.lin(x)


class Graph(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        widths = [16, *[32] * (depth - 1), 4]
        self.layers = nn.ModuleList([Layer(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x, adjacency))
        return self.layers[-1](x, adjacency)


def graph() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    chances = torch.where(labels[:, None] == labels[None], 0.12, 0.016)
    upper = torch.triu((torch.rand(120, 120, generator=g) < chances).float(), 1)
    adjacency = upper + upper.T + torch.eye(120)
    scale = adjacency.sum(1).pow(-0.5)
    x = torch.randn(120, 16, generator=g) + torch.randn(4, 16, generator=g)[labels]
    return x, scale[:, None] * adjacency * scale[None], labels


def test_deep_graph_layers_are_given_skips_that_train():
    torch.manual_seed(0)
    x, adjacency, labels = graph()
    loss = lambda out: functional.cross_entropy(out, labels)  # noqa: E731
    done = treat(Graph(16), x, adjacency, loss=loss)
    (first, *_) = done.applied
    assert first.kind == "vanishing"
    assert first.remedy.startswith("put a skip round each Layer")
    optimizer = torch.optim.Adam(done.model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss(done.model(x, adjacency)).backward()
        optimizer.step()
    assert float(loss(done.model(x, adjacency)).detach()) < 0.7


def test_two_graph_layers_need_nothing():
    torch.manual_seed(0)
    x, adjacency, labels = graph()
    found = examine(stabkit.trace(Graph(2), x, adjacency), lambda out: functional.cross_entropy(out, labels))
    assert [f for f in found.findings if serious(f)] == []


def test_deep_sigmoids_are_told_what_trains_with_adam():
    torch.manual_seed(0)
    layers = [each for i in range(9) for each in (nn.Linear(16 if i == 0 else 64, 64), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    x = torch.randn(256, 16)
    labels = (x @ torch.randn(16, 4)).argmax(1)
    found = examine(stabkit.trace(model, x), lambda out: functional.cross_entropy(out, labels))
    (told,) = [f for f in found.findings if serious(f)]
    assert told.kind == "vanishing"
    assert "ReLU" in told.remedy or "skip" in told.remedy
    assert "none is told" not in told.remedy


class Recurrent(nn.Module):
    """A classifier of sequences whose gates are driven far, by features of size 10."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gates, self.head = nn.GRU(24, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gates(4 * x.relu())[0].mean(1))


def test_flat_gates_of_a_network_that_has_learnt_are_a_fact_where_opening_them_undoes_it():
    labels, generator = torch.arange(96) % 4, torch.Generator().manual_seed(1)
    x = torch.randn(96, 12, 24, generator=generator) + 3 * torch.randn(4, 1, 24, generator=generator)[labels]
    model = Recurrent()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert float((model(x).argmax(1) == labels).float().mean()) > 0.98
    found = examine(stabkit.trace(model, x), lambda out: functional.cross_entropy(out, labels)).findings
    assert [f.severity for f in found if f.kind == "saturated"] == ["info"]
