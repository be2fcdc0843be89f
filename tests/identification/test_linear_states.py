"""Steps that numbers alone make: rotations, oscillators and complex recurrences, run as a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH, TIMES = 4, 6


class Recurrence(nn.Module):
    """A loop over time of one written rule, whose input is projected first."""

    def __init__(self, rule, states=2, complex_state=False):
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.states, self.complex_state = rule, states, complex_state
        self.angle, self.decay = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.b = nn.Linear(3, WIDTH)

    def forward(self, u):
        state = [u.new_zeros(len(u), WIDTH) + (0j if self.complex_state else 0.0) for _ in range(self.states)]
        for t in range(TIMES):
            state = self.rule(self, self.b(u[:, t]), *state)
        return torch.cat([s.real for s in state], -1) if self.complex_state else torch.cat(list(state), -1)


def rotation(m, u, x, y):
    c, s = torch.cos(m.angle), torch.sin(m.angle)
    return 0.9 * (c * x - s * y) + u, 0.9 * (s * x + c * y)


def oscillator(m, u, x, v):
    v = 0.97 * v + 0.1 * (u - m.angle.exp() * x)
    return x + 0.1 * v, v


def turned(m, u, z):
    return (torch.polar(torch.sigmoid(m.decay), m.angle) * z + u,)


def fed(m, u, z):
    return (torch.polar(torch.sigmoid(u), m.angle) * z + u,)


def field(m, u, z):
    return (torch.polar(torch.sigmoid(m.decay), m.angle) * z + torch.tanh((z + 0.1).abs()) + u,)


def read(rule, **named):
    return identify(trace(Recurrence(rule, **named), torch.randn(5, TIMES, 3)))


@pytest.mark.parametrize(
    ("rule", "modulus"), [(rotation, "0.9"), (oscillator, "0.985")], ids=["rotation", "oscillator"]
)
def test_two_states_that_turn(rule, modulus):
    found = read(rule)[2]
    assert found.name == f"linear oscillator (|eigenvalues| {modulus})"
    assert found.evidence == "measured"
    assert found.method is None


def test_a_complex_state_is_multiplied_by_numbers_of_its_own():
    model = Recurrence(turned, states=1, complex_state=True)
    sizes = torch.sigmoid(model.decay)
    found = read(turned, states=1, complex_state=True)
    assert {r.name for r in found[1:-1]} == {f"linear recurrence (|a| from {sizes.min():.3g} to {sizes.max():.3g})"}
    assert found[2].residual < 1e-5
    assert not any("input" in note for note in found[2].notes)


def test_numbers_that_the_input_makes_are_told_as_those_at_this_input():
    found = read(fed, states=1, complex_state=True)
    assert any("depend on the input" in note for note in found[2].notes)


def test_a_field_of_a_complex_state_is_no_linear_recurrence():
    found = read(field, states=1, complex_state=True)
    assert not any("linear recurrence" in r.name for r in found)
    assert np.all([r.evidence != "proven" or r.name in ("transition", "fork", "join") for r in found])
