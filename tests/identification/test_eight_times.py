"""Recurrences over eight times, of which the first begins at zeros: seven rounds are alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH, TIMES = 6, 8


class Memory(nn.Module):
    """A branch with a recurrence over time inside, beside a skip."""

    def __init__(self, recur):
        super().__init__()
        self.norm, self.value, self.rate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.out, self.recur = nn.Linear(WIDTH, WIDTH), recur

    def forward(self, x):
        u = self.norm(x)
        rounds = zip(self.value(u).unbind(1), torch.sigmoid(self.rate(u)).unbind(1), strict=True)
        return x + self.out(torch.stack(self.recur(rounds, torch.zeros_like(x[:, 0])), 1))


def decay(rounds, s):
    found = []
    for v, g in rounds:
        s = g * s + v
        found.append(s)
    return found


def momentum(rounds, s):
    m, found = s, []
    for v, g in rounds:
        m = g * m + 0.3 * (v - s)
        s = (1 - 0.2 * g) * s + m
        found.append(s)
    return found


def gated(rounds, s):
    found = []
    for v, g in rounds:
        s = g * s + (1 - g) * v.tanh()
        found.append(s)
    return found


@pytest.mark.parametrize(
    ("recur", "told"), [(decay, "linear recurrence"), (momentum, "linear oscillator"), (gated, "gated Euler")]
)
def test_eight_times_that_begin_at_zeros_are_read_and_shown(recur, told):
    torch.manual_seed(0)
    model = nn.Sequential(*(Memory(recur) for _ in range(3)))
    found = identify(trace(model, torch.randn(2, TIMES, WIDTH), depth=["0", "1", "2"]))
    for record in found:
        assert record.name == "forward Euler"
        assert len(record.over_time) == 1
        assert record.over_time[0].name.startswith(told)
        assert record.over_time[0].evidence != "proven"
        assert "over time" in str(record)


def test_what_runs_over_time_is_shown_behind_other_notes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.f = Memory(decay), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.memory(x)
            return x + torch.tanh(self.f(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Two() for _ in range(3)))
    found = identify(trace(model, torch.randn(2, TIMES, WIDTH), depth=["0", "1", "2"]))
    assert all("; over time: linear recurrence" in str(record) for record in found)


def test_seven_layers_that_take_a_slice_each_are_no_times():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(TIMES))

        def forward(self, x):
            y = x.mean(1)
            for layer, given in zip(self.layers, x.unbind(1), strict=True):
                y = y + torch.tanh(layer(y + given))
            return y

    torch.manual_seed(0)
    found = identify(trace(Layers(), torch.randn(2, TIMES, WIDTH)))
    assert not [record for record in found if record.over_time]
