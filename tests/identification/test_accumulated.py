"""A sum beside a state, read by nothing but additions, is no half of a system; two that move by turns are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit import identify, trace

DEPTH = 6


def mlp(width=6):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class Readout(nn.Module):
    """Layers whose outputs are summed up beside the state."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.rule = nn.Linear(3, 6), nn.Linear(6, 2), rule
        self.f = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.g = nn.ModuleList(nn.Linear(6, 6) for _ in range(DEPTH))

    def forward(self, x):
        h = self.first(x)
        total = torch.zeros_like(h)
        for f, g in zip(self.f, self.g, strict=True):
            h, total = self.rule(f, g, h, total)
        return self.last(torch.relu(total))


def names(rule, **more):
    found = identify(trace(Readout(rule).double(), torch.randn(4, 3).double(), **more))
    return [record.name for record in found]


def rectified(f, g, h, total):
    h = torch.relu(h + f(h))
    return h, total + g(h)


def before(f, g, h, total):
    return h + f(h), total + g(h)


def behind(f, g, h, total):
    h = h + f(h)
    return h, total + g(h)


def of_states(f, g, h, total):
    h = h + f(h)
    return h, total + h


def plain(f, g, h, total):
    h = f(h)
    return h, total + g(h)


SYSTEMS = ("leapfrog", "coupling", "reversible", "two-step", "oscillator", "symplectic")


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (rectified, "2 states: projected Euler (ReLU), running sum"),
        (before, "forward Euler, beside a sum of outputs"),
        (behind, "forward Euler, beside a sum of outputs"),
        (of_states, "forward Euler, beside a sum of outputs"),
        (plain, "plain, beside a sum of outputs"),
    ],
)
def test_a_sum_of_outputs_is_no_half_of_a_system(rule, name):
    found = names(rule)
    assert found.count(name) >= 3
    assert not any(system in each for system in SYSTEMS for each in found)


def test_where_the_sum_is_a_step_of_its_own_both_are_one_round():
    found = names(behind, depth=["f.*", "g.*"])
    assert "forward Euler, beside a sum of outputs" in found
    assert not any(system in each for system in SYSTEMS for each in found)


def by_turns(f, g, h, total):
    h = h + f(total)
    return h, total + torch.tanh(g(h))


def test_two_that_read_each_other_by_turns_stay_a_system():
    assert "reversible (two-stream symplectic Euler)" in names(by_turns)
    assert any(name.startswith(("leapfrog", "additive coupling", "reversible"))
               for name in names(by_turns, depth=["f.*", "g.*"]))  # fmt: skip


class Register(nn.Module):
    """Two-step methods: the older of two states is moved by a field of the younger one."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.rule = nn.ModuleList(mlp() for _ in range(DEPTH)), rule

    def forward(self, x):
        old, new = x, x + self.f[0](x)
        for f in self.f:
            old, new = new, self.rule(f, old, new)
        return new


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (lambda f, old, new: old + 0.2 * f(new), "leapfrog, or additive couplings in turn"),
        (lambda f, old, new: 2 * new - old + 0.04 * f(new), "second_order_leapfrog"),
        (lambda f, old, new: new + 0.2 * f(old), "delayed Euler (k = 1)"),
    ],
)
def test_two_step_methods_stay(rule, name):
    flow = trace(Register(rule).double(), torch.randn(4, 6).double())
    assert [record.name for record in identify(flow)].count(name) >= 3


def test_a_position_that_its_own_velocity_does_not_read_is_no_oscillator():
    class Drift(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            self.f = nn.ModuleList(mlp() for _ in range(DEPTH))

        def forward(self, x):
            y = v = self.first(x)
            for f in self.f:
                v = v + 0.1 * f(v + self.pull * y)
                y = y + 0.1 * v
            return self.last(y)

    model = Drift().double()
    told = []
    for model.pull in (0.0, 1.0):
        told.append({record.name for record in identify(trace(model, torch.randn(4, 3).double()))})
    assert "forward Euler, beside a sum of outputs" in told[0]
    assert any(name.startswith("oscillator") for name in told[1])
