"""What depth is counted from, and where the first and the last of several like layers begin and end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import dense

WIDTH, NODES = 8, 10


class Graph(nn.Module):
    """Relaxation towards an average over neighbours, whose weights every layer makes anew of the degrees."""

    def __init__(self, look_up, layers=5):
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Convolution(look_up) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, edges):
        x = torch.relu(self.first(x))
        for layer in self.layers:
            x = 0.5 * x + 0.5 * layer(x, edges)
        return self.head(x)


class Convolution(nn.Module):
    def __init__(self, look_up):
        super().__init__()
        self.weight, self.look_up = nn.Linear(WIDTH, WIDTH), look_up

    def forward(self, x, edges):
        row, col = edges
        degree = torch.zeros(len(x)).index_add_(0, col, torch.ones(len(col)))
        value = (self.look_up(degree, row) * self.look_up(degree, col)).rsqrt()
        sent = value[:, None] * self.weight(x)[row]
        return torch.tanh(torch.zeros_like(x).index_add(0, col, sent) + self.weight(x))


@pytest.mark.parametrize("look_up", [lambda d, i: d[i], lambda d, i: d.index_select(0, i), lambda d, i: d.gather(0, i)])
def test_depth_is_counted_from_the_features_and_not_from_weights_of_edges(look_up):
    torch.manual_seed(0)
    a = torch.arange(NODES)
    edges = torch.stack([torch.cat([a, (a + 1) % NODES]), torch.cat([(a + 1) % NODES, a])])
    flow = trace(Graph(look_up), torch.randn(NODES, 3), edges, batch_dim=None)
    assert flow.source_name == "0"
    found = [record for record in identify(flow) if record.name.startswith("damped Euler (a = 0.5)")]
    assert len(found) == 5
    assert all(record.step_size == pytest.approx(0.5) for record in found)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g, self.up = dense(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x, memory=None):
        x = x + self.f(x)
        if memory is None:
            return x
        x = x + torch.tanh(self.g(memory + x))
        return x, self.up(x)


class Trend(nn.Module):
    """An encoder, and a decoder beside whose state a sum is carried."""

    def __init__(self):
        super().__init__()
        self.into, self.start = nn.Linear(2, WIDTH), nn.Linear(2, WIDTH)
        self.encoder = nn.ModuleList(Layer() for _ in range(3))
        self.decoder = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        trend, rest = x.cumsum(1), x - x.mean(1, keepdim=True)
        memory = self.into(x)
        for layer in self.encoder:
            memory = layer(memory)
        y = self.start(rest)
        for layer in self.decoder:
            y, more = layer(y, memory)
            trend = trend + more
        return trend + self.head(self.norm(y))


def test_the_first_and_the_last_layers_beside_what_waits_are_read_as_the_others():
    torch.manual_seed(0)
    flow = trace(Trend(), torch.randn(3, 4, 2))
    found = {flow.steps[record.steps[0]].name: record.name for record in identify(flow)}
    assert [found[f"encoder.{i}"] for i in range(3)] == ["forward Euler"] * 3
    assert len({found[f"decoder.{i}"] for i in range(3)}) == 1
    assert found["decoder.2"].endswith("beside a sum of outputs")


class Core(nn.Module):
    """A core that is called again and again on its own result and what came before it."""

    def __init__(self, inject, rounds=4):
        super().__init__()
        self.prelude = nn.ModuleList([Post()])
        self.core = nn.ModuleList([Post(), Post()])
        self.adapter = nn.Linear(2 * WIDTH, WIDTH)
        self.inject, self.rounds = inject, rounds
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for block in self.prelude:
            x = block(x)
        s = torch.linspace(-1, 1, WIDTH).expand_as(x)
        for _ in range(self.rounds):
            s = self.inject(self, s, x)
            for block in self.core:
                s = block(s)
        return self.head(s)


class Post(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.norm = dense(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x + self.f(x))


@pytest.mark.parametrize(
    "inject",
    [
        lambda m, s, e: m.adapter(torch.cat([s, e], -1)),
        lambda m, s, e: m.adapter(torch.cat([e, s + e], -1)),
        lambda m, s, e: m.adapter(torch.cat([s.tanh(), e], -1)).tanh(),
    ],
)
def test_what_mixes_the_input_into_each_round_is_no_part_of_the_block_before(inject):
    torch.manual_seed(0)
    flow = trace(Core(inject), torch.randn(3, WIDTH))
    found = [(flow.steps[record.steps[0]].name, record.name) for record in identify(flow)]
    blocks = [name for step, name in found if step.startswith(("core", "prelude"))]
    assert blocks == ["projected Euler (post-norm)"] * 9
