"""Runge-Kutta methods on several states, written out state by state, and splittings with such methods inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH, H = 3, 0.2
TABLEAUX = {
    "heun2": ([[], [1.0]], [0.5, 0.5]),
    "midpoint": ([[], [0.5]], [0.0, 1.0]),
    "rk4": ([[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    "three_eighths": ([[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


def net(width=WIDTH, out=WIDTH):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, out))


class Solver(nn.Module):
    """Four steps of a method on two states, as solvers write them: a list of slopes, and a sum of them."""

    def __init__(self, tableau, field):
        super().__init__()
        (self.A, self.b), self.field = TABLEAUX[tableau], field
        self.f, self.g, self.both = net(), net(), net(2 * WIDTH, 2 * WIDTH)

    def forward(self, q):
        v = 0.1 * q
        for _ in range(4):
            slopes = []
            for row in self.A:
                at = [x + H * sum(a * k[i] for a, k in zip(row, slopes, strict=False)) if row else x
                      for i, x in enumerate((q, v))]  # fmt: skip
                slopes.append(self.field(self, *at))
            q, v = (x + H * sum(b * k[i] for b, k in zip(self.b, slopes, strict=True)) for i, x in enumerate((q, v)))
        return torch.cat([q, v], -1)


def second_step(tableau, field):
    torch.manual_seed(0)
    return identify(trace(Solver(tableau, field), torch.randn(4, WIDTH)))[2]


POSITION_VELOCITY = {
    "force of the position": lambda m, q, v: (v, m.f(q)),
    "force and friction": lambda m, q, v: (v, torch.tanh(m.g(q)) - 0.3 * v),
    "a spring besides": lambda m, q, v: (v, m.f(q) - 2.0 * q),
}
COUPLED = {
    "Hamiltonian": lambda m, q, v: (m.g(v), -m.f(q)),
    "FitzHugh-Nagumo": lambda m, q, v: (q - m.f(q) - v, 0.08 * (q + 0.7 - 0.8 * v)),
    "one network of both": lambda m, q, v: m.both(torch.cat([q, v], -1)).chunk(2, -1),
    "Lotka-Volterra": lambda m, q, v: (q * m.f(v), v * m.g(q)),
}


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("field", POSITION_VELOCITY)
def test_position_and_velocity(tableau, field):
    record = second_step(tableau, POSITION_VELOCITY[field])
    assert record.name == f"{tableau} (position, velocity)"
    assert record.evidence == "proven"
    assert record.step_size == pytest.approx(H)


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("field", COUPLED)
def test_states_that_are_coupled(tableau, field):
    record = second_step(tableau, COUPLED[field])
    assert record.name == f"{tableau} of 2 coupled states"
    assert record.step_size == pytest.approx(H)


def test_the_stability_matrix_is_that_of_the_method():
    """On x'' = z x the step multiplies (q, v / h) by R of the matrix of the system."""
    method = second_step("rk4", POSITION_VELOCITY["force of the position"]).method
    z = -0.7
    L = np.array([[0, 1], [z, 0]])
    R = sum(np.linalg.matrix_power(L, k) / f for k, f in enumerate((1, 1, 2, 6, 24)))
    M = np.asarray(method.stability_matrix(z))
    assert np.trace(M) == pytest.approx(np.trace(R), abs=1e-6)
    assert np.linalg.det(M) == pytest.approx(np.linalg.det(R), abs=1e-6)


def test_stages_that_are_no_such_method_have_no_name_of_one():
    """Position with the weights of Heun's method, velocity with those of the midpoint."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = net()

        def forward(self, q):
            v = 0.1 * q
            for _ in range(4):
                k, m = self.f(q), self.f(q + 0.5 * H * v)
                q, v = q + H * v + 0.3 * H * H * k, v + H * m
            return torch.cat([q, v], -1)

    torch.manual_seed(0)
    names = [r.name for r in identify(trace(Mixed(), torch.randn(4, WIDTH)))]
    assert not any("position, velocity" in name or "coupled" in name for name in names)


class Composed(nn.Module):
    """Midpoint steps of two fields, of the given sizes in turn; a learned number makes the block one layer."""

    def __init__(self, sizes, networks=2):
        super().__init__()
        self.sizes, self.fields = sizes, nn.ModuleList(net() for _ in range(networks))
        self.h = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        for size, i in self.sizes:
            f, h = self.fields[i], size * self.h
            x = x + h * f(x + 0.5 * h * f(x))
        return x


class Stack(nn.Sequential):
    def __init__(self, *sizes, networks=2):
        torch.manual_seed(0)
        super().__init__(*(Composed(sizes, networks) for _ in range(3)))


def test_half_steps_on_both_sides_are_a_splitting_of_strang():
    found = identify(trace(Stack((0.15, 0), (0.3, 1), (0.15, 0)), torch.randn(4, WIDTH), depth=["?"]))
    assert {r.name for r in found} == {"Strang splitting (midpoint inside)"}
    assert {round(r.step_size, 6) for r in found} == {0.3}
    three = Stack((0.1, 0), (0.1, 1), (0.2, 2), (0.1, 1), (0.1, 0), networks=3)
    assert {r.name for r in identify(trace(three, torch.randn(4, WIDTH), depth=["?"]))} == {
        "Strang splitting (midpoint inside)"
    }


def test_other_orders_are_none_of_strang():
    whole = Stack((0.3, 0), (0.3, 1), (0.3, 0))
    own = Stack((0.15, 0), (0.3, 1), (0.15, 2), networks=3)
    for model in (whole, own):
        assert all("Strang" not in r.name for r in identify(trace(model, torch.randn(4, WIDTH), depth=["?"])))


class Halves(nn.Module):
    """Two states kept side by side in one tensor, the older one replaced, and both exchanged, at every step."""

    def __init__(self, networks):
        super().__init__()
        torch.manual_seed(0)
        self.fields = nn.ModuleList(net() for _ in range(networks))

    def forward(self, x):
        state = torch.cat([x, 0.9 * x], -1)
        for i in range(6):
            new, old = state.chunk(2, -1)
            state = torch.cat([old + 2 * H * self.fields[i % len(self.fields)](new), new], -1)
        return state


def test_one_field_of_the_newer_half_is_the_two_step_midpoint_rule():
    found = identify(trace(Halves(1), torch.randn(4, WIDTH)))
    assert {r.name for r in found[2:5]} == {"leapfrog"}
    assert found[2].step_size == pytest.approx(H)


def test_fields_of_their_own_in_turn_are_couplings():
    found = identify(trace(Halves(6), torch.randn(4, WIDTH)))
    assert all("coupling" in r.name for r in found[2:5])


def test_a_field_between_old_and_new_states_is_no_step_of_euler():
    """The midpoint of velocities with other weights for the positions: each state by itself looks like Euler's rule."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.h = net(), nn.Parameter(H * (0.5 + torch.rand(WIDTH)))

        def forward(self, q):
            v = 0.1 * q
            for _ in range(4):
                slope = self.f(q)
                middle = self.f(q + 0.5 * self.h * v)
                q, v = q + self.h * (v + 0.5 * self.h * slope), v + self.h * middle
            return torch.cat([q, v], -1)

    torch.manual_seed(0)
    names = [r.name for r in identify(trace(Between(), torch.randn(4, WIDTH)))[1:-1]]
    assert not any("Euler" in name for name in names)
