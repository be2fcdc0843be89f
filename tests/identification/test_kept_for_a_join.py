"""Layers whose results are all kept for one join: detectors' blocks of parts of the channels, graph propagation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.identification import identify
from stabkit.tracing import trace

CHANNELS, NODES, WIDTH = 8, 9, 6


def conv(inputs, outputs, size=1):
    parts = [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*parts)


class Bottleneck(nn.Module):
    def __init__(self, channels, *, add=True):
        super().__init__()
        self.first, self.second, self.add = conv(channels, channels, 3), conv(channels, channels, 3), add

    def forward(self, x):
        return x + self.second(self.first(x)) if self.add else self.second(self.first(x))


class C2f(nn.Module):
    """Half of the channels pass by; of the other half a chain of bottlenecks, all of which are joined."""

    def __init__(self, count, *, add=True):
        super().__init__()
        self.first, self.last = conv(CHANNELS, CHANNELS), conv((2 + count) * CHANNELS // 2, CHANNELS)
        self.chain = nn.ModuleList(Bottleneck(CHANNELS // 2, add=add) for _ in range(count))

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.chain)
        return self.last(torch.cat(parts, 1))


class CrossStage(nn.Module):
    """Only the end of the chain is joined to the half that passes by (CSPNet)."""

    def __init__(self, count):
        super().__init__()
        self.first, self.last = conv(CHANNELS, CHANNELS), conv(CHANNELS, CHANNELS)
        self.chain = nn.Sequential(*(Bottleneck(CHANNELS // 2) for _ in range(count)))

    def forward(self, x):
        beside, x = self.first(x).split(CHANNELS // 2, 1)
        return self.last(torch.cat([beside, self.chain(x)], 1))


def read(model, *given, **options):
    torch.manual_seed(0)
    model.eval()
    return identify(trace(model, *given, **options))


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("block", [C2f, CrossStage])
def test_a_chain_on_a_part_of_the_channels_is_eulers_method(block, count):
    first, *chain, last = [r for r in read(block(count), torch.randn(2, CHANNELS, 5, 5)) if r.name != "plain"]
    assert [(r.name, r.evidence) for r in chain] == [("forward Euler", "proven")] * count
    assert first.name == "transition"
    assert last.name in ("join", "transition")


def test_a_chain_without_additions_is_no_step():
    found = read(C2f(3, add=False), torch.randn(2, CHANNELS, 5, 5))
    assert [r.name for r in found] == ["transition", "plain", "plain", "plain", "join"]


def test_a_block_as_a_whole_is_no_step_and_tells_of_those_inside():
    found = read(nn.Sequential(*(C2f(2) for _ in range(3))), torch.randn(2, CHANNELS, 5, 5))
    assert [r.name for r in found] == ["plain"] * 3
    assert all(any(note.startswith("2 residual addition(s)") for note in r.notes) for r in found)


def adjacency():
    torch.manual_seed(1)
    A = (torch.rand(NODES, NODES) > 0.5).float()
    A = ((A + A.T) > 0).float() + torch.eye(NODES)
    d = A.sum(1).rsqrt()
    return d[:, None] * A * d[None]


class Propagation(nn.Module):
    """Products with one graph, and no module: what each layer makes is mixed in the end, or along the way."""

    def __init__(self, rounds=4):
        super().__init__()
        self.rounds, self.first = rounds, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("A", adjacency())
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(rounds))


class MeanOfLayers(Propagation):
    """He et al. 2020 (LightGCN)."""

    def forward(self, x):
        layers = [x]
        for _ in range(self.rounds):
            layers.append(self.A @ layers[-1])
        return torch.stack(layers, 1).mean(1)


class InitialResidual(Propagation):
    """Chen et al. 2020 (GCNII)."""

    def forward(self, x):
        h = x = functional.relu(self.first(x))
        for i, weight in enumerate(self.weights):
            mixed = 0.9 * (self.A @ x) + 0.1 * h
            x = functional.relu(0.5 / (i + 1) * (mixed @ weight) + (1 - 0.5 / (i + 1)) * mixed)
        return x


@pytest.mark.parametrize("model", [MeanOfLayers, InitialResidual])
def test_propagation_along_a_graph_is_a_map_for_each_layer_and_no_step(model):
    found = read(model(), torch.randn(NODES, WIDTH), batch_dim=None)
    plain = [r for r in found if r.name == "plain"]
    assert len(plain) >= 3
    assert {r.skip for r in plain} == {0.0}


ENDS = adjacency().nonzero(as_tuple=True)


def passed(x):
    """Messages along the edges, added up at their ends."""
    to, of = ENDS
    return torch.zeros_like(x).index_add(0, to, adjacency()[ENDS][:, None] * x[of])


def scattered(x):
    to, of = ENDS
    messages = adjacency()[ENDS].view(-1, 1) * x.index_select(0, of)
    return torch.zeros_like(x).scatter_add(0, to[:, None].expand_as(messages), messages)


RESTARTS = {
    "a dense product": lambda A, x, h: 0.9 * (A @ x) + 0.1 * h,
    "messages": lambda A, x, h: 0.9 * passed(x) + 0.1 * h,
    "messages, in two lines": lambda A, x, h: scattered(x) * (1 - 0.1) + 0.1 * h,
    "an interpolation": lambda A, x, h: torch.lerp(passed(x), h, 0.1),
    "one operation": lambda A, x, h: torch.addmm(h, A, x, beta=0.1, alpha=0.9),
    "a sum over indices": lambda A, x, h: 0.1 * h + torch.einsum("ij,jk->ik", A, 0.9 * x),
}


class Ruled(Propagation):
    """Gasteiger et al. 2019 (APPNP), or another rule."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, x):
        h = x = self.first(x)
        for _ in range(self.rounds):
            x = self.rule(self.A, x, h)
        return torch.log_softmax(x, 1)


@pytest.mark.parametrize("rule", RESTARTS.values(), ids=RESTARTS)
def test_a_linear_map_and_a_state_that_is_held_is_a_restart_from_it(rule):
    """What is added is no field of the state, in whatever spelling; of the first step, the state itself is held."""
    found = read(Ruled(rule), torch.randn(NODES, WIDTH), batch_dim=None)
    restarts = [(r.name, r.evidence) for r in found[1:-1]]
    assert restarts == [("restart from a held state x_0 (P x + 0.1 x_0)", "proven")] * 4


def test_what_is_added_behind_a_map_and_depends_on_the_state_is_no_restart():
    def rule(A, x, h):
        y = passed(x)
        return y + 0.1 * torch.tanh(y + h)

    found = read(Ruled(rule), torch.randn(NODES, WIDTH), batch_dim=None)
    assert {r.name for r in found[2:-1]} == {"transformed skip"}


def test_a_held_state_behind_a_map_that_bends_is_no_field():
    found = read(
        Ruled(lambda A, x, h: 0.9 * torch.softmax(passed(x), 1) + 0.1 * h), torch.randn(NODES, WIDTH), batch_dim=None
    )
    assert {(r.name, r.skip) for r in found[2:-1]} == {("plain", 0.0)}
