"""Loops of solvers and of physics, as repositories write them: starters, iterations, kept forces, linear maps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import Identification

H = 0.1


class Loop(nn.Module):
    """A function of the state and of a field of two layers."""

    def __init__(self, function: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, width))
        self.matrix = nn.Parameter(torch.randn(width, width) / 2)
        self.function = function

    def forward(self, *state: Tensor) -> Any:
        return self.function(self, *state)


def records(function: Callable[..., Any], states: int = 1, width: int = 4) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    given = [torch.randn(5, width) for _ in range(states)]
    return stabkit.identify(stabkit.trace(Loop(function, width), *given), checks=False)


def midpoint_by_iteration(m: Loop, x: Tensor) -> Tensor:
    for _ in range(4):
        new = x
        for _ in range(4):
            new = x + H * m.field((x + new) / 2 if m.training else 0.5 * (x + new))
        x = new
    return x


def test_an_iteration_that_begins_at_the_state_evaluates_one_field_throughout():
    assert {r.name for r in records(midpoint_by_iteration)} == {"implicit_midpoint (by 3 fixed-point iterations)"}


def test_a_mean_of_a_value_with_itself_is_no_activation():
    found = records(lambda m, x: x + H * m.field(0.5 * (x + x)))
    assert found[0].name == "forward Euler"
    assert found[0].step_size == pytest.approx(H)


def port_hamiltonian(m: Loop, x: Tensor) -> Tensor:
    flow = m.matrix - m.matrix.T - 0.1 * m.matrix @ m.matrix.T
    for _ in range(5):
        x = x + H * ((m.field(x) + x) @ flow.T)
    return x


def test_a_linear_map_of_the_state_and_a_field_is_one_field():
    found = records(port_hamiltonian)
    assert {r.name for r in found} == {"forward Euler"}
    assert all(r.step_size == pytest.approx(H) for r in found)


def test_a_field_behind_another_one_stays_a_stage():
    found = records(lambda m, x: x + H * torch.tanh((x + torch.tanh(m.field(x))) @ m.matrix))
    assert found[0].name != "forward Euler"


def lagrangian(m: Loop, z: Tensor) -> Tensor:
    q, v = z.chunk(2, -1)
    for _ in range(5):
        v = v + H * torch.tanh(m.field(torch.cat([q, v], -1)))[..., : q.shape[-1]]
        q = q + H * v
    return torch.cat([q, v], -1)


def test_a_force_of_position_and_velocity_has_no_restoring_term_beside_it():
    found = records(lagrangian)
    assert all("force of position and velocity" in r.name for r in found[1:])
    assert all(r.system == "x'' = f(x, x')" for r in found[1:])
    assert all(r.step_size == pytest.approx(H) for r in found[1:])


def velocity_verlet(m: Loop, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a = m.field(x)
    for _ in range(8):
        x = x + v * H + 0.5 * a * H**2
        new = m.field(x)
        v, a = v + 0.5 * (a + new) * H, new
    return x, v


def test_a_force_and_a_velocity_that_are_kept_make_verlets_step():
    found = records(velocity_verlet, states=2)
    assert all(r.name == "stormer_verlet" for r in found[1:-1])
    assert all(r.step_size == pytest.approx(H) for r in found[1:-1])


WEIGHTS = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12]}


def adams(m: Loop, x: Tensor) -> Tensor:
    values: deque[Tensor] = deque(maxlen=3)
    for _ in range(7):
        values.appendleft(m.field(x))
        x = x + H * sum(w * f for w, f in zip(WEIGHTS[len(values)], values, strict=True))
    return x


def test_starters_of_a_multistep_method_are_steps_of_their_own():
    found = records(adams)
    assert found[0].name == "forward Euler and then ab2 (h = 0.1)"
    assert {r.name for r in found[1:]} == {"ab3"}


def test_orders_that_rise_are_told_one_by_one():
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def solve(m: Loop, x: Tensor) -> Tensor:
        return torchdiffeq.odeint(
            lambda _, y: m.field(y), x, torch.tensor([0.0, 0.5]), method="explicit_adams", options={"step_size": H}
        )[1]

    torch.manual_seed(0)
    flow = stabkit.trace(Loop(solve), torch.randn(5, 4), depth=[""])
    assert stabkit.identify(flow, checks=False)[0].name == (
        "2 steps of three_eighths and then ab3 and then ab4 and then ab5 (h = 0.1)"
    )


def backward_differentiation(m: Loop, x: Tensor) -> Tensor:
    older, newest = x, x + H * m.field(x)
    for _ in range(5):
        y = newest
        for _ in range(4):
            y = (4 * newest - older) / 3 + 2 / 3 * H * m.field(y)
        older, newest = newest, y
    return newest


def test_backward_differentiation_by_iteration_is_told_by_its_numbers():
    found = records(backward_differentiation)
    assert {r.name for r in found[1:-1]} == {"bdf2 (by 3 fixed-point iterations)"}
    assert all(r.step_size == pytest.approx(H) for r in found[1:-1])


def test_other_numbers_are_no_backward_differentiation():
    def blended(m: Loop, x: Tensor) -> Tensor:
        older, newest = x, x + H * m.field(x)
        for _ in range(5):
            y = newest
            for _ in range(4):
                y = 1.4 * newest - 0.4 * older + 2 / 3 * H * m.field(y)
            older, newest = newest, y
        return newest

    assert not any("bdf" in r.name for r in records(blended))


class GraphNetwork(nn.Module):
    """States of nodes, of edges and of the whole, each of which reads the others (Battaglia et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        nodes, ends = 8, torch.randint(0, 8, (2, 20), generator=torch.Generator().manual_seed(1))
        self.nodes, self.ends = nodes, ends
        self.first = nn.ModuleList(nn.Linear(5, 6) for _ in range(3))
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(w, 6) for w in (24, 18, 18)) for _ in range(4))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        start, stop = self.ends
        given = (x, x[start] - x[stop], x.mean(0, keepdim=True))
        state = [torch.tanh(layer(part)) for layer, part in zip(self.first, given, strict=True)]
        for edge, node, whole in self.blocks:
            n, e, g = state
            de = torch.tanh(edge(torch.cat([n[start], n[stop], e, g.expand(len(e), -1)], -1)))
            received = torch.zeros_like(n).index_add(0, stop, de)
            dn = torch.tanh(node(torch.cat([n, received, g.expand(len(n), -1)], -1)))
            dg = torch.tanh(whole(torch.cat([g, dn.mean(0, keepdim=True), de.mean(0, keepdim=True)], -1)))
            state = [a + b for a, b in zip(state, (dn, de, dg), strict=True)]
        return self.last(state[0])


def test_the_last_block_of_a_graph_network_reads_one_of_its_three_states():
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(GraphNetwork(), torch.randn(8, 5), batch_dim=None), checks=False)
    coupled = [r for r in found if r.name == "forward Euler of 3 coupled states"]
    assert len(coupled) == 4
    assert "the last step of its kind" in coupled[-1].notes[0]
