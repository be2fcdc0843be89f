"""Steps inside of forks and joins: what the first and the last of a stack do to the state that goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit import identify, trace

WIDTH, LAYERS = 6, 4


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.norm(x))))


class WithFirstValues(nn.Module):
    """Layers that mix their values with those of the first layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.value, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.field = Field()

    def forward(self, x, first):
        v = self.value(self.norm(x))
        first = v if first is None else first
        x = x + self.out(torch.tanh(0.5 * v + 0.5 * first))
        return x + self.field(x), first


class WithScores(nn.Module):
    """Layers that add up a table from layer to layer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, scores):
        y = self.norm(x)
        new = self.q(y) @ self.k(y).mT
        scores = new if scores is None else scores + new
        return x + scores.softmax(-1) @ self.v(y), scores


class Stack(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x, beside = self.embed(x), None
        for layer in self.layers:
            x, beside = layer(x, beside)
        return self.head(x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Field(), Field()

    def forward(self, a, b):
        a = a + self.f(b)
        return a, b + self.g(a)


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.embed = nn.ModuleList(Pair() for _ in range(LAYERS)), nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        a, b = self.embed(x).chunk(2, -1)
        for layer in self.layers:
            a, b = layer(a, b)
        return self.head(torch.tanh(torch.cat([a, b], -1)))


def read(model, *inputs):
    return identify(trace(model.double().eval(), *(i.double() for i in inputs), depth="auto"))


def test_a_value_for_later_layers_leaves_the_steps_of_the_state():
    found = [r for r in read(Stack(WithFirstValues), torch.randn(2, 5, WIDTH)) if "Lie splitting" in r.name]
    assert [r.name for r in found] == ["Lie splitting (2 Euler steps)"] * LAYERS
    assert found[0].notes[0] == "1 value is made beside the state, for later steps: a fork"
    assert (found[0].method, found[0].skip, found[0].step_size) == (None, None, 1.0)


def test_scores_that_are_added_up_leave_the_steps_of_the_state():
    found = [r for r in read(Stack(WithScores), torch.randn(2, 5, WIDTH)) if r.name not in ("transition", "plain")]
    assert [r.name for r in found] == ["Gauss-Seidel Euler of 2 coupled states"] * LAYERS
    assert "1 of 2 states begins at a constant" in found[0].notes[0]
    assert found[-1].notes[0].endswith("a join")


def test_the_last_step_of_two_streams_is_told_before_they_are_joined():
    found = [r for r in read(Reversible(), torch.randn(3, WIDTH)) if r.name.startswith("reversible")]
    assert len(found) == LAYERS


class Towers(nn.Module):
    """Two stacks that begin at one tensor and are read together at the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.ModuleList(Field() for _ in range(LAYERS)) for _ in range(2))
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        a = b = self.embed(x)
        for f, g in zip(self.a, self.b, strict=True):
            a, b = a + f(a), b + g(b)
        return self.head(torch.cat([a, b], -1))


class Fusion(nn.Module):
    """Two inputs, each with layers of its own, of which one is added to the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x, y):
        return self.head(torch.relu(self.a(x)) + torch.relu(self.b(y)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        kept = []
        for layer in self.down:
            x = torch.relu(layer(x))
            kept.append(x)
            x = functional.avg_pool2d(x, 2)
        for layer in self.up:
            x = torch.relu(layer(torch.cat([functional.interpolate(x, scale_factor=2.0), kept.pop()], 1)))
        return x


def test_two_towers_begin_as_two():
    found = read(Towers(), torch.randn(3, WIDTH))
    assert [r.name for r in found][1:-1] == ["2 states: forward Euler, forward Euler"] * LAYERS
    assert "2 states begin as one" in found[1].notes[0]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Fusion(), (torch.randn(3, WIDTH), torch.randn(3, WIDTH))), (UNet(), (torch.randn(2, 4, 16, 16),))],
)
def test_layers_without_a_skip_of_their_own_hold_no_step(model, inputs):
    found = read(model, *inputs)
    assert not any(note.endswith(("a fork", "a join")) for r in found for note in r.notes)
