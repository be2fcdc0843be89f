"""The first and the last step of coupled states: begun at constants, left unread, or taking turns with another step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

D, N = 8, 5
EULER = "forward Euler of 2 coupled states"


def mlp(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, D), nn.SiLU(), nn.Linear(D, out))


class Equivariant(nn.Module):
    """Features and coordinates of the nodes of a graph, updated together."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node, self.coordinate = mlp(2 * D + 1, D), mlp(2 * D, D), mlp(D, 1)

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        apart = x[:, :, None] - x[:, None]
        pairs = (h[:, :, None].expand(-1, -1, N, -1), h[:, None].expand(-1, N, -1, -1))
        message = self.edge(torch.cat([*pairs, apart.square().sum(-1, keepdim=True)], -1))
        new = h + self.node(torch.cat([h, message.sum(2)], -1))
        return new, x + (apart * self.coordinate(message)).mean(2)


class Message(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(D, 3 * D)

    def forward(self, q: Tensor, v: Tensor, ways: Tensor) -> tuple[Tensor, Tensor]:
        dq, along, kept = (self.net(q)[:, None] * ways[..., :1]).chunk(3, -1)
        return q + dq.sum(2), v + (along[..., None] * ways[:, :, :, None] + kept[..., None] * v[:, None]).sum(2)


class Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2 * D, 3 * D)

    def forward(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        length = (v.square().sum(-1) + 1e-6).sqrt()
        dq, dv, both = self.net(torch.cat([q, length], -1)).chunk(3, -1)
        return q + dq + both * length, v + dv[..., None] * v


class Graph(nn.Module):
    def __init__(self, layers: list[nn.Module], into: int) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(into, D), nn.ModuleList(layers), nn.Linear(D, 1)

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        h = self.embed(features)
        turns = isinstance(self.layers[0], Message)
        state = h.new_zeros(*h.shape, 3) if turns else x
        for layer in self.layers:
            h, state = layer(h, state, x[:, :, None] - x[:, None]) if isinstance(layer, Message) else layer(h, state)
        return self.head(h)


def read(layers: list[nn.Module]) -> list[stabkit.Identification]:
    inputs = torch.randn(3, N, 4), torch.randn(3, N, 3)
    records = stabkit.identify(stabkit.trace(Graph(layers, 4), *inputs), checks=False)
    return [record for record in records if record.name not in ("plain", "transition")]


@pytest.mark.parametrize("count", [3, 4])
def test_the_last_layer_of_which_the_features_alone_are_read_is_one_of_the_coupled_steps(count):
    torch.manual_seed(0)
    found = read([Equivariant() for _ in range(count)])
    assert [record.name for record in found] == [EULER] * count
    assert "1 of its 2 states are not read" in found[-1].notes[0]


def test_both_ends_of_steps_that_take_turns_are_like_every_other_one():
    torch.manual_seed(0)
    found = read([layer() for _ in range(3) for layer in (Message, Update)])
    turn = ["2 states: forward Euler, forward Euler", EULER]
    assert [record.name for record in found] == turn * 3
    assert found[0].notes[0].startswith("the first step of its kind: it does what the next of that kind does")


def test_parts_of_one_network_are_no_chain_of_fields():
    torch.manual_seed(0)
    names = [record.name for record in read([layer() for _ in range(3) for layer in (Message, Update)])]
    assert not any("PolyNet" in name for name in names)
