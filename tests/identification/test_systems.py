"""Methods of several states: which values are their states, in which order, and what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import stabkit
from stabkit.identification import identify
from stabkit.tracing import trace

from .family import dense

Z = np.random.default_rng(0).normal(size=(20, 2)) @ np.array([1, 1j])
WIDTH = 6


class Depth(nn.Module):
    """Layers with weights of their own, and what a function of them and the input returns."""

    def __init__(self, forward, layers=6, width=WIDTH):
        super().__init__()
        self.fields = nn.ModuleList(dense(width) for _ in range(layers))
        self.function = forward

    def forward(self, x):
        return self.function(self.fields, x)


def records(forward, **named):
    torch.manual_seed(0)
    model = Depth(forward, **named).double()
    return identify(trace(model, torch.randn(3, WIDTH, dtype=torch.float64)))


def adams_bashforth_3(fields, x, h=0.1):
    f, past = fields[0], []
    for _ in range(8):
        past = [f(x), *past[:2]]
        weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12)][len(past) - 1]
        x = x + h * sum(w * k for w, k in zip(weights, past, strict=True))
    return x


def test_old_fields_are_states_and_nothing_held_fixed():
    found = records(adams_bashforth_3)
    third_order = [record for record in found if record.name == "ab3"]
    assert len(third_order) == 6  # of 8 steps all but the starters, the last of which joins the old fields
    assert third_order[0].step_size == pytest.approx(0.1)


def test_a_matrix_that_all_steps_read_is_held_fixed():
    def diffusion(fields, x):
        A = torch.softmax(fields[0](x) @ fields[1](x).T, -1)
        for _ in range(3):
            x = x + 0.5 * (A @ x - x)
        return x

    torch.manual_seed(0)
    flow = trace(Depth(diffusion).double(), torch.randn(5, WIDTH, dtype=torch.float64), batch_dim=None)
    assert [(record.name, record.skip) for record in identify(flow)[1:]] == [("damped Euler (a = 0.5)", 0.5)] * 3


def test_the_last_step_keeps_its_input_fixed():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, WIDTH)

        def forward(self, inputs):
            h = inputs.new_zeros(inputs.shape[1], WIDTH)
            for u in inputs:
                h = self.cell(u, h)
            return h

    torch.manual_seed(0)
    found = identify(trace(Loop(), torch.randn(5, 2, 3)))
    assert all(record.name.startswith("gated Euler") for record in found[1:])


def nesterov(fields, x, g=0.9, h=0.1):
    v = torch.zeros_like(x)
    for f in fields:
        v = g * v + h * f(x + g * v)
        x = x + v
    return x


def explicit(fields, x, h=0.1):
    v = torch.zeros_like(x)
    for f in fields:
        x, v = x + h * v, v + h * f(x)
    return x


def verlet(fields, x, h=0.1):
    v = torch.zeros_like(x)
    for f in fields:
        v = v + h / 2 * f(x)
        x = x + h * v
        v = v + h / 2 * f(x)
    return torch.cat([x, v], -1)


@pytest.mark.parametrize(
    ("forward", "name", "order", "trace_and_determinant"),
    [
        (nesterov, "Nesterov momentum (gamma = 0.9)", 1, lambda z: (1.9 * (1 + z), 0.9 * (1 + z))),
        (explicit, "forward Euler (position, velocity)", 2, lambda z: (2 + 0 * z, 1 - z)),
        (verlet, "stormer_verlet", 2, lambda z: (2 + z, 1 + 0 * z)),
    ],
    ids=["nesterov", "explicit", "verlet"],
)
def test_position_and_velocity(forward, name, order, trace_and_determinant):
    record = records(forward)[2]
    assert (record.name, record.step_size) == (name, pytest.approx(0.1))
    fields = [Z] * record.method.n_fields  # where the step is cut in its middle, two layers take part in it
    ours = [np.poly(M) for M in record.method.stability_matrix(*fields)]
    expected = [[1, -t, d] for t, d in zip(*trace_and_determinant(Z), strict=True)]
    assert np.allclose(ours, expected, atol=1e-8) or np.allclose(ours, [[1, -t, d] for t, d in zip(
        *trace_and_determinant(-Z), strict=True)], atol=1e-8)  # fmt: skip


class Coupling(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = dense(3), dense(3)

    def forward(self, a, b):
        a = a + self.f(b)
        return a, b + self.g(a)


class Reversible(nn.Module):
    def __init__(self, swap):
        super().__init__()
        self.blocks = nn.ModuleList(Coupling() for _ in range(3))
        self.swap = swap

    def forward(self, x):
        a, b = torch.split(x, 3, -1)
        for block in self.blocks:
            if self.swap:
                a, b = b, a + block.f(b)
                a, b = b, a + block.g(b)
            else:
                a, b = block(a, b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("swap", [False, True])
def test_half_steps_are_paired_wherever_the_first_begins(swap):
    torch.manual_seed(0)
    found = identify(trace(Reversible(swap).double(), torch.randn(4, 6, dtype=torch.float64)))
    names = [record.name for record in found if record.name != "fork"]
    assert names == ["reversible (two-stream symplectic Euler)"] * 3


def test_one_stream_that_stays_is_half_of_a_reversible_step():
    def coupling(fields, x):
        for f in fields:
            a, b = x.chunk(2, -1)
            x = torch.cat([a, b + f(a)], -1)
        return x

    assert {record.name for record in records(coupling, width=3)} == {"additive coupling (half of a reversible step)"}


def test_an_affine_coupling_is_no_multiscale_cell():
    def coupling(fields, x):
        for f in fields:
            a, b = x.chunk(2, -1)
            x = torch.cat([a, b * torch.exp(f(a)) + torch.tanh(f(a))], -1)
        return x

    assert {record.name for record in records(coupling, width=3)} == {"affine coupling"}


def test_an_oscillator_is_known_wherever_its_step_is_cut():
    layer = nn.Linear(2 * WIDTH, WIDTH).double()

    def kick_drift(state):
        y, v = state
        v = v + 0.1 * (torch.tanh(layer(torch.cat([y, v], -1))) - 1.2 * y - 0.7 * v)
        return y + 0.1 * v, v

    def drift_kick(state):
        y, v = state
        y = y + 0.1 * v
        return y, v + 0.1 * (torch.tanh(layer(torch.cat([y, v], -1))) - 1.2 * y - 0.7 * v)

    start = tuple(torch.randn(2, WIDTH, dtype=torch.float64) for _ in range(2))
    for step in (kick_drift, drift_kick):
        record = identify(stabkit.iterate(step, start, 3))[0]
        assert record.name == "damped oscillator, symplectic Euler (coRNN)"
        assert record.step_size == pytest.approx(0.1, rel=1e-6)


def test_an_oscillator_of_independent_units_is_read_at_one_of_them():
    rate, weight = torch.rand(2, WIDTH, dtype=torch.float64)

    def step(state):
        y, v = state
        v = v - rate * (torch.tanh(weight * y) + 0.9 * y)
        return y + rate * v, v

    start = tuple(torch.randn(2, WIDTH, dtype=torch.float64) for _ in range(2))
    record = identify(stabkit.iterate(step, start, 3))[0]
    assert record.name == "oscillator, symplectic Euler (UnICORNN)"
    assert f"dt from {float(rate.min()):.3g} to {float(rate.max()):.3g} by entry" in record.convention
    assert record.step_size is None
    assert np.linalg.det(record.method.stability_matrix(Z)) == pytest.approx(1.0)
    assert "the tableau is that of the first" in record.notes[1]


class LinearShears(nn.Module):
    """The linear module of a SympNet (Jin et al. 2020): shears by symmetric matrices in turn, and a bias."""

    def __init__(self, count, activation=False):
        super().__init__()
        self.S = nn.ParameterList(nn.Parameter(torch.randn(3, 3) / 3) for _ in range(count))
        self.bias, self.activation = nn.Parameter(torch.randn(6)), activation

    def forward(self, x):
        p, q = x[..., :3], x[..., 3:]
        for i, S in enumerate(self.S):
            if i % 2:
                q = q + p @ (S + S.t())
            else:
                p = p + q @ (S + S.t())
        x = torch.cat([p, q], -1) + self.bias
        if not self.activation:
            return x
        p, q = x[..., :3], x[..., 3:]
        return torch.cat([p + 0.5 * torch.sigmoid(q), q], -1)


@pytest.mark.parametrize(
    ("count", "activation", "name"),
    [
        (2, False, "symplectic Euler (Hamiltonian)"),
        (4, False, "reversible (4 couplings in turn)"),
        (2, True, "reversible (3 couplings in turn)"),
    ],
)
def test_shears_by_linear_maps_are_couplings_whatever_is_joined_between(count, activation, name):
    torch.manual_seed(0)
    model = nn.Sequential(*(LinearShears(count, activation) for _ in range(4)))
    assert {r.name for r in identify(trace(model, torch.randn(3, 6)), checks=False)} == {name}


class Damped(nn.Module):
    """A position and a velocity with friction; ``force``, ``drift`` multiply the field and the velocity."""

    def __init__(self, force, drift, kept, shared=True):
        super().__init__()
        torch.manual_seed(0)
        self.K, self.numbers = nn.Parameter(torch.randn(8, 4)), (force, drift, kept)

    def forward(self, q):
        force, drift, kept = self.numbers
        p = torch.zeros_like(q)
        for _ in range(5):
            p = kept * p - force * (torch.tanh(q @ self.K.T) @ self.K)
            q = q + drift * p
        return q


@pytest.mark.parametrize(
    ("force", "drift", "kept", "name", "h"),
    [
        (0.1, 0.1, 0.97, "damped symplectic Euler (position, velocity), friction 0.3", 0.1),
        (0.2, 0.2, 0.9, "damped symplectic Euler (position, velocity), friction 0.5", 0.2),
        (0.1, 0.1, 0.9, "momentum (gamma = 0.9)", 0.01),
        (1.0, 1.0, 0.9, "momentum (gamma = 0.9)", 1.0),
        (1.0, 0.1, 0.9, "momentum (gamma = 0.9)", 0.1),
        (0.1, 1.0, 0.9, "momentum (gamma = 0.9)", 0.1),
    ],
)
def test_friction_and_momentum_are_told_by_their_numbers(force, drift, kept, name, h):
    flow = trace(Damped(force, drift, kept).double(), torch.randn(3, 4).double())
    found = [r for r in identify(flow) if r.name not in ("fork", "join", "transition")]
    assert {r.name for r in found} == {name}
    assert [r.step_size for r in found] == pytest.approx([h] * len(found))
