"""Branches whose step size a controller makes: of the state, of a condition, of a stream, of the layer's index."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH, DEPTH, SMALL = 12, 4, 6


def network(inputs=WIDTH, outputs=WIDTH):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.fields = nn.ModuleList(network() for _ in range(DEPTH))


class OfTheState(Stack):
    """A network of the state and the index of the layer predicts the step."""

    def __init__(self):
        super().__init__()
        self.step = nn.Sequential(nn.Linear(WIDTH + 1, 8), nn.ReLU(), nn.Linear(8, 1), nn.Softplus())

    def forward(self, x):
        for i, field in enumerate(self.fields):
            x = x + self.step(torch.cat([x, torch.full_like(x[:, :1], i)], 1)) * field(x)
        return x


class OfTheInput(Stack):
    """A hypernetwork makes the gates of all layers of the input."""

    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(WIDTH, DEPTH)

    def forward(self, x):
        gates = torch.sigmoid(self.gates(x))
        for i, field in enumerate(self.fields):
            x = x + gates[:, i : i + 1] * field(x)
        return x


class OfTheIndex(Stack):
    """Of the index alone: a constant."""

    def __init__(self):
        super().__init__()
        self.table, self.step = nn.Embedding(DEPTH, 8), nn.Linear(8, 1)

    def forward(self, x):
        for i, field in enumerate(self.fields):
            x = x + torch.sigmoid(self.step(self.table(torch.tensor(i)))) * field(x)
        return x


class Squeezed(Stack):
    """Attention over the channels of the field, made of it: a part of the field."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for field, gate in zip(self.fields, self.gates, strict=True):
            value = field(x)
            x = x + torch.sigmoid(gate(value)) * value
        return x


class Highway(Stack):
    """Gates of the input of the whole, made layer by layer by networks in a list of their own."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        u = x
        for field, gate in zip(self.fields, self.gates, strict=True):
            t = torch.sigmoid(gate(u))
            x = t * field(x) + (1 - t) * x
        return x


class TwoStreams(Stack):
    """A stream of gates with steps of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.moves = nn.Linear(WIDTH, SMALL), nn.ModuleList(network(SMALL, SMALL) for _ in range(DEPTH))
        self.out = nn.ModuleList(nn.Linear(SMALL, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        c = self.first(x)
        for field, move, out in zip(self.fields, self.moves, self.out, strict=True):
            s = torch.sigmoid(out(c))
            x, c = (1 - s) * x + s * field(x), c + move(c)
        return x


def read(model):
    torch.manual_seed(0)
    found = identify(trace(model(), torch.randn(3, WIDTH)))
    return [r for r in found if r.name not in ("fork", "join", "transition")]


@pytest.mark.parametrize(("model", "system"), [(OfTheState, "x' = h(x) F(x)"), (OfTheInput, "x' = h(c) F(x)")])
def test_a_step_that_is_predicted_is_a_function(model, system):
    found = read(model)
    assert len(found) == DEPTH
    assert {(r.name, r.system, r.step_size) for r in found} == {("forward Euler", system, 1.0)}
    assert all("no constant" in r.convention for r in found)


def test_what_the_index_of_a_layer_makes_is_a_constant():
    found = read(OfTheIndex)
    assert len({r.step_size for r in found}) == DEPTH
    assert {(r.name, r.system, r.evidence) for r in found} == {("forward Euler", "x' = f(x)", "proven")}


def test_attention_that_a_field_pays_to_itself_is_no_step():
    assert {(r.name, r.system) for r in read(Squeezed)} == {("forward Euler", "x' = f(x)")}


@pytest.mark.parametrize(
    ("model", "name"), [(Highway, "gated Euler (mean a"), (TwoStreams, "2 states: forward Euler, gated")]
)
def test_gates_in_a_list_of_their_own_are_read_with_the_layers(model, name):
    found = read(model)
    assert len(found) >= DEPTH - 1
    assert all(r.name.startswith(name) and r.evidence == "measured" for r in found)


class Modulated(nn.Module):
    """Blocks of a diffusion transformer (Peebles and Xie 2023): norms, fields and steps answer to a condition."""

    def __init__(self, branches=2, learned=False):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(branches))
        self.fields = nn.ModuleList(network() for _ in range(branches))
        self.made = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * branches * WIDTH))
        self.scales = nn.Parameter(torch.randn(branches, WIDTH)) if learned else None

    def forward(self, x, c):
        parts = self.made(c).chunk(3 * len(self.fields), 1)
        for i, (norm, field) in enumerate(zip(self.norms, self.fields, strict=True)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            gate = gate if self.scales is None else self.scales[i]
            x = x + gate * field(norm(x) * (1 + scale) + shift)
        return x


class Conditioned(nn.Module):
    """Modulated blocks whose condition is an input of its own, or made of the state at first."""

    def __init__(self, own=False, **more):
        super().__init__()
        self.condition, self.own = nn.Linear(WIDTH, WIDTH), own
        self.blocks = nn.ModuleList(Modulated(**more) for _ in range(DEPTH))

    def forward(self, x, c=None):
        c = self.condition(x if self.own else c)
        for block in self.blocks:
            x = block(x, c)
        return x


def conditioned(**more):
    torch.manual_seed(0)
    model, x = Conditioned(**more), torch.randn(3, WIDTH)
    given = (x,) if model.own else (x, torch.randn(3, WIDTH))
    found = identify(trace(model, *given, depth=["blocks.*"], source="0"))
    return [r for r in found if r.name not in ("fork", "join", "transition", "no branch")]


@pytest.mark.parametrize(
    ("branches", "name"),
    [(1, "forward Euler"), (2, "Lie splitting (2 Euler steps)"), (3, "Lie splitting (3 Euler steps)")],
)
def test_gates_of_another_input_are_steps_that_depend_on_it(branches, name):
    found = conditioned(branches=branches)
    assert len(found) == DEPTH
    assert {(r.name, r.evidence) for r in found} == {(name, "measured")}
    assert all("(c) F" in r.convention and "held fixed" in r.notes[0] for r in found)
    assert not any("LayerScale" in note for r in found for note in r.notes)


@pytest.mark.parametrize(("branches", "system"), [(1, "x' = h(c) F(x)"), (2, "x' = h_1(c) F_1(x) + h_2(c) F_2(x)")])
def test_gates_of_a_condition_that_is_made_of_the_state(branches, system):
    found = conditioned(branches=branches, own=True)
    assert {(r.system, r.step_size) for r in found} == {(system, 1.0)}
    assert all("no constant" in r.convention for r in found)


def test_learned_scales_beside_a_condition_are_numbers():
    found = conditioned(branches=1, learned=True)
    assert {(r.name, r.evidence) for r in found} == {("forward Euler", "proven")}
    assert all("(c)" not in r.convention and any("LayerScale" in note for note in r.notes) for r in found)
