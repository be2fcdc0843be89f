from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.tracing.graph.loops import loops_of_calls
from tests.identification import samplers as s


def traced(model: nn.Module) -> stabkit.Flow:
    torch.manual_seed(0)
    return stabkit.trace(model.double(), torch.randn(3, s.WIDTH, dtype=torch.float64))


def rounds(model: nn.Module) -> list[tuple[int, int]]:
    """How many rounds every loop has, and how many values each hands on."""
    return [(loop.count, loop.carried) for loop in loops_of_calls(traced(model).recorded.graph)]


def of(step, n: int) -> nn.Module:
    return s.Loop(lambda m, x, i: step(s.FIELDS["damped"](m), x, i * s.H), rounds=n)


@pytest.mark.parametrize("step", [s.heun, s.midpoint, s.rk4])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_round_is_a_step_however_many_stages_it_has(step, n):
    assert rounds(of(step, n)) == [(n, 1)]


@pytest.mark.parametrize("step", [s.heun, s.midpoint, s.rk4])
def test_the_stages_of_one_step_are_no_rounds(step):
    assert rounds(of(step, 1)) == []
    assert len(traced(of(step, 1))) == 1


@pytest.mark.parametrize("step", [s.heun, s.midpoint, s.rk4])
@pytest.mark.parametrize("n", [3, 4])
def test_a_first_round_that_begins_at_a_constant_is_none(step, n):
    assert rounds(s.WithInput("condition", step, begins=True, rounds=n)) == [(n - 1, 1)]
    assert rounds(s.WithInput("condition", step, begins=True, rounds=2)) == []


def test_a_history_is_handed_on():
    assert rounds(s.Adams((1.5, -0.5), "time")) == [(5, 2)]
    assert rounds(s.Adams((23 / 12, -16 / 12, 5 / 12), "time")) == [(4, 3)]
    assert rounds(s.DPMSolverPlusPlus()) == [(5, 2)]


def test_position_and_velocity_are_handed_on():
    assert rounds(s.Leapfrog()) == [(3, 2)]  # what the last round does to the velocity is not returned


def test_parallel_evaluations_are_no_rounds():
    def guided(m: s.Loop, x: Tensor, i: int) -> Tensor:
        given, free = m.net(x, 0.0), m.net(x, 1.0)
        return x - 0.1 * (free + 2.0 * (given - free))

    assert rounds(s.Loop(guided, rounds=1)) == []
    assert rounds(s.Loop(guided, rounds=3)) == [(3, 1)]


class Cells(nn.Module):
    """A recurrent network that returns what it was at all times."""

    def __init__(self, unbind: bool) -> None:
        super().__init__()
        self.cell, self.head, self.unbind = nn.LSTMCell(3, 4), nn.Linear(4, 2), unbind

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        seen = []
        for u in x.unbind(1) if self.unbind else (x[:, t] for t in range(x.shape[1])):
            h, c = self.cell(u, (h, c))
            seen.append(h)
        return self.head(torch.stack(seen, 1))


@pytest.mark.parametrize("unbind", [True, False])
def test_what_waits_for_the_output_and_what_comes_in_are_no_states(unbind):
    torch.manual_seed(0)
    flow = stabkit.trace(Cells(unbind).double(), torch.randn(2, 9, 3, dtype=torch.float64), check=False)
    (loop,) = loops_of_calls(flow.recorded.graph)
    assert loop.carried == 2
    assert loop.count in (7, 8)  # the first begins at zero; the last hands nothing on


def test_untied_layers_are_no_loop():
    model = nn.Sequential(*(nn.Linear(s.WIDTH, s.WIDTH) for _ in range(4)))
    assert rounds(model) == []


@pytest.mark.parametrize("kind", ["condition", "source", "damped source", "drive"])
def test_steps_end_where_rounds_do(kind):
    model = s.WithInput(kind, s.rk4, begins=False, rounds=3)
    flow = traced(model)
    (loop,) = loops_of_calls(flow.recorded.graph)
    assert [state.position for state in flow.states if state.position >= loop.start] == list(loop.boundaries)


def test_parts_of_a_splitting_stay_steps_of_their_own():
    def strang(m: s.Loop, x: Tensor, i: int) -> Tensor:
        x = x + s.H / 2 * m.net(x, 0.0)
        x = x + s.H * m.other(x, 0.0)
        return x + s.H / 2 * m.net(x, 0.0)

    model = s.Loop(strang)
    model.other = s.Net()
    assert rounds(model) == [(4, 1)]
    assert len(traced(model)) == 12
