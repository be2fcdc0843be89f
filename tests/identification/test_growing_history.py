"""Layers that mix all states before them: a general linear method whose history grows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import dense

WIDTH, LAYERS = 8, 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = dense(WIDTH), dense(WIDTH)

    def forward(self, x):
        x = x + self.f(x)
        return x + self.g(x)


class History(nn.Module):
    """Blocks that read a mixture of the results of all before."""

    def __init__(self, mix):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(i + 1)) for i in range(LAYERS + 1))
        self.query = nn.Linear(WIDTH, WIDTH)
        self.head, self.mix = nn.Linear(WIDTH, 2), mix

    def forward(self, x):
        past = [x]
        for layer, weights in zip(self.layers, self.weights, strict=False):
            past.append(layer(self.mix(self, past, weights)))
        return self.head(self.mix(self, past, self.weights[-1]))


MIXTURES = {
    "stack": lambda m, past, w: (torch.stack(past, 0) * w.view(-1, 1, 1)).sum(0),
    "sum": lambda m, past, w: sum(a * x for a, x in zip(w, past, strict=True)),
    "softmax": lambda m, past, w: torch.einsum("l,lbd->bd", w.softmax(0), torch.stack(past)),
    "stack behind": lambda m, past, w: torch.stack(past, -1) @ w,
}


def read(mix, layers=LAYERS):
    torch.manual_seed(0)
    model = History(mix)
    return model, identify(trace(model, torch.randn(3, WIDTH), depth=[f"layers.{i}" for i in range(layers)]))


@pytest.mark.parametrize("how", MIXTURES)
def test_a_history_that_grows_is_read_with_all_its_weights(how):
    model, found = read(MIXTURES[how])
    named = [record for record in found if "growing history" in record.name]
    assert [record.name for record in named[:3]] == [
        f"general linear method with a growing history ({n} states)" for n in (2, 3, 4)
    ]
    for record, weights in zip(named, model.weights[1:], strict=False):
        w = (weights.softmax(0) if how == "softmax" else weights).tolist()
        assert ", ".join(f"{x:.3g}" for x in w) in record.notes[0]
        assert (record.skip, record.method, record.evidence) == (None, None, "measured")


def test_weights_that_depend_on_the_states_make_no_step_of_a_method():
    def attend(m, past, w):
        stacked = torch.stack(past)
        scores = (m.query(past[-1]) * stacked).sum(-1, keepdim=True)
        return (scores.softmax(0) * stacked).sum(0)

    _, found = read(attend)
    assert [record.name for record in found] == ["fork"] * 4 + ["join", "transition"]
    assert {(record.method, record.skip, record.step_size) for record in found} == {(None, None, None)}


@pytest.mark.parametrize("how", MIXTURES)
def test_what_is_proven_of_a_mixture_is_that_states_come_and_go(how):
    _, found = read(MIXTURES[how])
    assert [(r.name.partition(" (")[0], r.evidence) for r in found] == [
        ("Lie splitting" if how == "softmax" else found[0].name.partition(" (")[0], "proven"),
        *[("general linear method with a growing history", "measured")] * 4,
        ("transition", "proven"),
    ]


def test_an_input_that_every_layer_reads_is_no_growing_history():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            first = x
            for layer in self.layers:
                x = layer(0.8 * x + 0.2 * first)
            return x

    torch.manual_seed(0)
    found = identify(trace(First(), torch.randn(3, WIDTH)))
    assert not [record for record in found if "growing history" in record.name]


class Rollout(nn.Module):
    """Positions of a second-order system, all of which are returned, though each needs the last two alone."""

    def __init__(self, how):
        super().__init__()
        self.how, self.f, self.g = (
            how,
            dense(WIDTH),
            nn.Sequential(nn.Linear(2 * WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH)),
        )

    def force(self, x, older):
        if self.how == "position":
            return self.f(x)
        return self.g(torch.cat([x, x - older if self.how == "velocity" else older], -1))

    def forward(self, x):
        older, kept = 0.9 * x, []
        for _ in range(5):
            x, older = 2 * x - older + 0.25 * self.force(x, older), x
            kept.append(x)
        return torch.stack(kept).transpose(0, 1) if self.how == "older" else torch.stack(kept, 1)


@pytest.mark.parametrize("how", ["position", "velocity", "older"])
def test_states_that_are_kept_for_the_output_alone_are_no_history(how):
    """A trajectory is a list of states, and a step of it reads no more of them than the method does."""
    torch.manual_seed(0)
    found = identify(trace(Rollout(how), torch.randn(3, WIDTH)))
    named = [record for record in found if record.name.startswith("second_order_leapfrog")]
    assert len(named) >= 3
    assert {record.name for record in named} == {
        "second_order_leapfrog" if how == "position" else
        "second_order_leapfrog (Stormer-Verlet, position form), force of position and velocity"
    }  # fmt: skip
    assert {(record.evidence, round(record.step_size, 6)) for record in named} == {("proven", 0.5)}
