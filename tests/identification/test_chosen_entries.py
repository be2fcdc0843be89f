"""What is held: entries by masks that are constants of the code, and a first state that every layer reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH, PERIODS = 8, (1, 2, 4, 8)


class Clockwork(nn.Module):
    """Groups of units that are made anew every first, second, fourth and eighth time (Koutnik et al. 2014)."""

    def __init__(self, held=1.0, leak=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.wx, self.wh, self.held, self.leak = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), held, leak

    def forward(self, x):
        h = torch.tanh(self.wx(x[:, 0]))
        for t in range(1, x.shape[1]):
            active = torch.cat([torch.full((WIDTH // len(PERIODS),), float(t % p == 0)) for p in PERIODS])
            new = torch.tanh(self.wh(h) + self.wx(x[:, t]))
            h = active * new + self.held * (1 - active) * h + self.leak * new
        return h


def read(**named):
    return identify(trace(Clockwork(**named), torch.randn(5, 9, 3)))


def test_units_that_are_held_stay_and_the_others_are_made_anew():
    names = [r.name for r in read()]
    for share in (25, 50, 75):
        assert f"some entries made anew, the others held ({share}%)" in names
    assert "not a step" not in names


@pytest.mark.parametrize("named", [{"held": 0.9}, {"leak": 0.1}])
def test_where_more_happens_to_the_others_only_the_skip_is_told(named):
    names = [r.name for r in read(**named)]
    assert not any("held" in name for name in names)
    assert any(name.startswith("skip at some entries only") for name in names)


class Convolution(nn.Module):
    """(1 - b) S + b S W with S = 0.9 P x + 0.1 x_0 (Chen et al. 2020, GCNII)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(6, 6))

    def forward(self, x, P, held, share):
        mixed = 0.9 * (P @ x) + 0.1 * held
        return share * (mixed @ self.weight) + (1 - share) * mixed


class GCNII(nn.Module):
    """Five such layers, b smaller from one to the next, with a relu behind each."""

    def __init__(self, layers=5, nodes=7):
        super().__init__()
        torch.manual_seed(0)
        A = torch.eye(nodes) + torch.eye(nodes).roll(1, 0) + torch.eye(nodes).roll(-1, 0)
        self.register_buffer("P", A / 3)
        self.first, self.layers = nn.Linear(4, 6), nn.ModuleList(Convolution() for _ in range(layers))

    def forward(self, x):
        x = held = torch.relu(self.first(x))
        for i, layer in enumerate(self.layers, 1):
            x = torch.relu(layer(x, self.P, held, 0.4 / i))
        return x


def test_layers_that_read_a_held_state_are_no_stages_of_one_step():
    found = identify(trace(GCNII(), torch.randn(7, 4)))
    assert max(len(r.steps) for r in found) == 1
    inside = [note for r in found for note in r.notes if "an addition of what is held, then damped Euler" in note]
    assert len(inside) >= 3
