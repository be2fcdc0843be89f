"""Learned forward-backward steps whose gradient step is two matrices (LISTA), and what is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit import identify, trace

from .optimisation_models import shrink

ROUNDS, MEASURED, WIDTH = 6, 10, 16


class Rounds(nn.Module):
    def __init__(self, rule, tied):
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Linear(MEASURED, WIDTH, bias=False)
        self.S = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(1 if tied else ROUNDS))
        self.rule = rule

    def forward(self, y):
        b = self.W(y)
        x = torch.tanh(b)
        for k in range(ROUNDS):
            x = self.rule(self.S[k % len(self.S)], b, x)
        return x


def names(rule, tied, **more):
    found = identify(trace(Rounds(rule, tied).double(), torch.randn(8, MEASURED).double(), **more))
    return [r for r in found if r.name not in ("fork", "join", "transition")]


def lista(S, b, x):
    return shrink(b + S(x), 0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_a_soft_threshold_behind_a_linear_map(tied):
    found = [r for r in names(lista, tied) if r.name.startswith("linear step, then soft threshold")]
    assert len(found) >= 3
    assert all(r.evidence == "measured" and any("prox" in n and "0.05" in n for n in r.notes) for r in found)


def rectified(S, b, x):
    return torch.relu(b + S(x))


def with_a_field(S, b, x):
    return shrink(b + S(torch.tanh(x)), 0.05)


def alone(S, b, x):
    return shrink(S(x), 0.05)


@pytest.mark.parametrize("rule", [rectified, with_a_field, alone])
def test_other_maps_of_a_state_are_no_learned_gradient_step(rule):
    assert not any("forward-backward" in r.name for r in names(rule, True))
