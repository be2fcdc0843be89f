"""Masks that are constants of the code: which entries a step makes anew, and which it holds."""

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
