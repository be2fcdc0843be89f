"""Cells and stacks over time as they are written: gates from zeros, two branches, solves in chunks, cut layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit import identify, trace
from stabkit.identification import Identification

WIDTH, TIMES = 6, 7


class Loop(nn.Module):
    """A cell that is called on one slice after the other, from zeros."""

    def __init__(self, cell: Callable[..., Any], states: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.states = cell, states
        self.of_input, self.of_state = nn.Linear(3, 4 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.of_new, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        state = tuple(x.new_zeros(len(x), WIDTH) for _ in range(self.states))
        for given in x.unbind(1):
            state = self.cell(self, self.of_input(given), *state)
        return self.head(state[0])


def read(cell: Callable[..., Any], states: int = 1) -> list[Identification]:
    found = identify(trace(Loop(cell, states).double(), torch.randn(2, TIMES, 3).double()), checks=False)
    return [r for r in found if r.name != "transition"]


def lem(m: Loop, given: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Long Expressive Memory (Rusch et al. 2022)."""
    a, b, for_z, for_y = given.chunk(4, 1)
    of_a, of_b, of_y = m.of_state(y).chunk(3, 1)
    slow, fast = torch.sigmoid(a + of_a), torch.sigmoid(b + of_b)
    z = (1.0 - slow) * z + slow * torch.tanh(for_z + of_y)
    return (1.0 - fast) * y + fast * torch.tanh(m.of_new(z) + for_y), z


def ltc(m: Loop, given: Tensor, v: Tensor) -> tuple[Tensor]:
    """Two rounds of a liquid time constant network (Hasani et al. 2021), with a leak that depends on the state."""
    added, weight, *_ = given.chunk(4, 1)
    for _ in range(2):
        act = functional.softplus(m.matrix) * torch.sigmoid(3 * (v[..., None] - 0.3))
        v = (2 * v + (act * m.matrix).sum(1) + added) / (2.5 + act.sum(1) + torch.sigmoid(weight))
    return (v,)


def test_a_first_step_from_zeros_is_one_of_its_kind_though_it_has_gates():
    found = read(lem, 2)
    assert [r.name for r in found] == ["gated Gauss-Seidel Euler of two states (LEM)"] * TIMES
    assert "2 of 2 states begins at a constant" in found[0].notes[0]
    assert found[0].method is None
    assert {r.name.partition(" (")[0] for r in read(ltc)} == {"2 substeps of semi-implicit Euler"}


def test_a_first_step_that_does_something_else_is_none_of_its_kind():
    def bent(m: Loop, given: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y, new = lem(m, given, y, z)
        return (y if z.requires_grad else torch.relu(y)), new

    def smaller(m: Loop, given: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        new, z = lem(m, given, y, z)
        return (new if y.requires_grad else 0.5 * new), z

    for cell in (bent, smaller):
        assert "(LEM)" not in read(cell, 2)[0].name


def leaky(m: Loop, given: Tensor, h: Tensor) -> tuple[Tensor]:
    return (0.75 * h + 0.25 * torch.tanh(m.of_new(h) + given[:, :WIDTH]),)


def lipschitz(m: Loop, given: Tensor, h: Tensor) -> tuple[Tensor]:
    """Erichson et al. 2021: the step size stands before the matrix of one branch and before the bend of the other."""
    return (h + 0.125 * h @ m.matrix + 0.125 * torch.tanh(m.of_new(h) + given[:, :WIDTH]),)


@pytest.mark.parametrize(("cell", "name", "h"), [(leaky, "damped Euler (a = 0.75)", 0.25),
                                                 (lipschitz, "forward Euler, parallel branches", 0.125)])  # fmt: skip
def test_what_drives_a_cell_is_no_number_of_its_method(cell, name, h):
    """The slice of the input that a field takes beside the state leaves its reading proven."""
    for record in read(cell):
        assert (record.name, record.evidence, record.step_size) == (name, "proven", pytest.approx(h))


@pytest.mark.parametrize("first", [True, False])
def test_of_two_bounded_factors_the_one_that_is_never_negative_is_the_step(first):
    """Gated antisymmetric networks (Chang et al. 2019) write eps z tanh(..), eps before either."""

    def cell(m: Loop, given: Tensor, h: Tensor) -> tuple[Tensor]:
        a, b, *_ = given.chunk(4, 1)
        z, f = torch.sigmoid(m.of_new(h) + a), torch.tanh(h @ (m.matrix - m.matrix.T) + b)
        return (h + (0.125 * z * f if first else 0.125 * f * z),)

    for record in read(cell):
        low, high = (float(word) for word in record.convention.split(" from ")[1].split(" here")[0].split(" to "))
        assert 0 < low < high < (0.125 if first else 1)


class Chunks(nn.Module):
    """The delta rule in chunks, by triangular systems (Yang et al. 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.beta = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.norm(x), 3
        q, k, v = (part.unflatten(1, (-1, size)) for part in self.qkv(y).chunk(3, -1))
        k, beta = functional.normalize(k, dim=-1), self.beta(y).sigmoid().unflatten(1, (-1, size))
        lower = torch.eye(size) + (beta * k @ k.mT).tril(-1)
        w, u = (torch.linalg.solve_triangular(lower, beta * part, upper=False) for part in (k, v))
        state, found = x.new_zeros(len(x), WIDTH, WIDTH), []
        for i in range(q.shape[1]):
            new = u[:, i] - w[:, i] @ state
            found.append(q[:, i] @ state + (q[:, i] @ k[:, i].mT).tril() @ new)
            state = state + k[:, i].mT @ new
        return x + self.out(torch.cat(found, 1))


def test_systems_that_are_solved_inside_a_field_are_no_implicit_step():
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(Chunks(), Chunks()), torch.randn(2, 15, WIDTH)), checks=False)
    assert [(r.name, r.evidence) for r in found] == [("forward Euler", "proven")] * 2
    assert all(r.over_time[0].name.startswith("linear recurrence (a matrix") for r in found)


class MassMatrix(nn.Module):
    """x' = x + S(x)^-1 f(x) with an S that is not made of the slope of f."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.s = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        system = torch.eye(WIDTH) - 0.1 * torch.tanh(self.s(x)).unflatten(-1, (WIDTH, WIDTH))
        return x + torch.linalg.solve(system, torch.tanh(self.f(x))[..., None])[..., 0]


def test_a_solution_by_a_matrix_that_is_no_slope_of_its_right_side_is_a_field():
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(MassMatrix(), MassMatrix()), torch.randn(2, WIDTH)), checks=False)
    assert [(r.name, r.evidence) for r in found] == [("forward Euler", "proven")] * 2


class SRU(nn.Module):
    """A simple recurrent unit (Lei et al. 2018), whose gates read the state, with its highway."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.v = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(2, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        c, found = torch.zeros_like(x[:, 0]), []
        for u, f, r, old in zip(*(p.unbind(1) for p in (*self.parts(x).chunk(3, -1), x)), strict=True):
            f, r = torch.sigmoid(f + self.v[0] * c), torch.sigmoid(r + self.v[1] * c)
            c = f * c + (1 - f) * u
            found.append(r * c + (1 - r) * old)
        return torch.stack(found, 1)


def test_stages_that_gates_weigh_have_no_step_size():
    torch.manual_seed(0)
    for record in identify(trace(nn.Sequential(SRU(), SRU()), torch.randn(2, 9, WIDTH)), checks=False):
        assert record.name.startswith("gated skip (mean a = 0.")
        assert (record.method, record.step_size, record.evidence) == (None, None, "measured")


class WaveNet(nn.Module):
    """Layers without modules of their own, written as rows of convolutions (van den Oord et al. 2016)."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, WIDTH, 1), nn.Conv1d(4, 2, 1)
        self.f, self.g = (nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 2, dilation=2**i) for i in range(depth)) for _ in "fg")
        self.r, self.s = (nn.ModuleList(nn.Conv1d(WIDTH, n, 1) for _ in range(depth)) for n in (WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0
        for i, (f, g, r, s) in enumerate(zip(self.f, self.g, self.r, self.s, strict=True)):
            given = functional.pad(x, (2**i, 0))
            z = torch.tanh(f(given)) * torch.sigmoid(g(given))
            total = s(z) + total
            x = r(z) + x
        return self.last(functional.relu(total))


@pytest.mark.parametrize(("depth", "cut"), [("auto", [1, 1, 1, 1, 1]), ("modules", [4, 4, 4, 4, 3])])
def test_layers_of_several_convolutions_are_steps_of_a_state_beside_a_sum_also_where_they_are_cut(depth, cut):
    torch.manual_seed(0)
    found = identify(trace(WaveNet(), torch.randn(2, 3, 40), depth=depth), checks=False)
    steps = [record for record in found if "Euler" in record.name]
    assert [len(record.steps) for record in steps] == cut
    assert {(r.name, r.evidence) for r in steps} == {("forward Euler, beside a sum of outputs", "proven")}
    assert not any(record.name == "no branch" for record in found)


class Exponential(nn.Module):
    """The sLSTM (Beck et al. 2024): exponential gates, a normaliser and a stabiliser beside the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.R, self.out = nn.Linear(3, 32), nn.Linear(8, 32, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        h = c = n = m = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            i, f, z, o = (self.W(x[:, t]) + self.R(h)).chunk(4, -1)
            f = functional.logsigmoid(f)
            new = torch.maximum(f + m, i)
            gate, kept = torch.exp(i - new), torch.exp(f + m - new)
            c, n, m = kept * c + gate * torch.tanh(z), kept * n + gate, new
            h = torch.sigmoid(o) * c / n
        return self.out(h)


def test_a_cell_with_a_normaliser_is_no_affine_coupling():
    torch.manual_seed(0)
    found = identify(trace(Exponential(), torch.randn(3, 10, 3)), checks=False)[1:-2]
    assert {record.name for record in found} == {"gated memory cell, read out over a normaliser (sLSTM)"}
    assert all("coupling" not in record.system and record.method is None for record in found)
    assert all("reads old x_1 and x_4, reads new x_1" in record.system for record in found)


class Oscillator(nn.Module):
    """Position and velocity at once, both from old values, and a field that both take a half of."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.first, self.parts = nn.Linear(3, 8), parts
        self.fields = nn.ModuleList(nn.Linear(16, 16 if parts else 8) for _ in range(6))

    def forward(self, x):
        y = self.first(x)
        z = torch.zeros_like(y)
        for f in self.fields:
            force = torch.tanh(f(torch.cat([y, z], -1)))
            dy, dz = force.chunk(2, -1) if self.parts else (z, force - 0.5 * z)
            y, z = y + 0.1 * dy, z + 0.1 * (dz - y)
        return y


@pytest.mark.parametrize("parts", [False, True])
def test_states_that_both_read_old_values_are_one_step_of_eulers(parts):
    torch.manual_seed(0)
    found = identify(trace(Oscillator(parts), torch.randn(4, 3)), checks=False)[1:]
    damped = "" if parts else " (damped oscillator)"
    assert {(record.name, record.evidence) for record in found} == {
        (f"forward Euler of 2 coupled states{damped}", "proven")
    }
    assert not any("no number is claimed" in note for record in found for note in record.notes)
