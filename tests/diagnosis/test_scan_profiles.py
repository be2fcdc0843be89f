"""Recurrences that are written out inside a module are judged by the gradient that reaches each of their states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Thresholds, examine
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.over_time.findings import loops_over_time, time_findings, time_profiles
from stabkit.diagnosis.over_time.profile import along_states, is_whole_state
from stabkit.tracing.graph.values import Meta, random_of
from tests.identification import scan_models as models


def drawn(times: int = 40) -> Tensor:
    return torch.randn(2, times, 3, generator=torch.Generator().manual_seed(1))


def said(model: nn.Module, x: Tensor) -> list[Finding]:
    return time_findings(stabkit.trace(model, x, check=False), None, Thresholds())


@pytest.mark.parametrize(
    "make", [m for m in models.SCANS if m is not models.s4d_forward], ids=lambda make: make.__name__
)
def test_a_model_that_reads_every_output_is_reached_everywhere(make):
    assert said(models.network(make), drawn()) == []


@pytest.mark.parametrize(
    ("make", "lever"),
    [
        (models.mamba, "A_log"),
        (models.mamba2_recurrent, "A_log"),
        (models.min_gru, "parts.0.bias"),
        (models.min_gru_lerp, "parts.0.bias"),
        (models.min_lstm, "parts.1.bias"),
    ],
)
def test_a_scan_that_forgets_before_its_end_is_told_with_what_makes_it_remember(make, lever):
    model, x = models.network(make, depth=1, last=True), drawn(60)
    (found,) = said(model, x)
    assert (found.kind, found.module_path, found.steps) == ("vanishing", "mixers.0", (1,))
    assert found.severity in ("info", "warning")  # what the input multiplies may open while a network trains
    assert found.numbers["growth_over_time"] < -6.9
    assert found.numbers["growth_per_time_step"] < 0.0
    assert [action["parameter"] for action in found.actions] == [f"mixers.0.{lever}"]
    assert "tried on a copy" in found.evidence
    stabkit.diagnosis.apply(model, found)
    assert said(model, x) == []


def test_the_growth_is_that_of_the_gradient_at_the_states():
    model, x = models.network(models.elman, depth=1, last=True), drawn(40)
    (found,) = said(model, x)
    m, states = model.mixers[0], []
    u = model.norms[0](model.stem(x)).detach()
    h = torch.zeros(2, 8, requires_grad=True)
    for t in range(40):
        h = torch.tanh(u[:, t] @ m.W.T + h @ m.U.T + m.b)
        h.retain_grad()
        states.append(h)
    h.sum().backward()
    sizes = torch.stack([state.grad.norm() for state in states]).log()
    assert found.numbers["growth_over_time"] == pytest.approx(float(sizes[:5].max() - sizes[-5:].max()), abs=2.5)


def test_a_step_in_time_that_is_too_long_explodes_and_is_shortened():
    model, x = models.network(models.s4d_forward), drawn()
    first, second = said(model, x)
    assert {first.kind, second.kind} == {"exploding"}
    assert first.severity == "critical"
    assert [a["parameter"] for f in (first, second) for a in f.actions] == ["mixers.0.log_dt", "mixers.1.log_dt"]
    for found in (first, second):
        stabkit.diagnosis.apply(model, found)
    assert said(model, x) == []


def test_a_scan_before_one_that_explodes_is_not_accused():
    model, x = models.network(models.s4d_zoh), drawn()
    later = models.network(models.s4d_forward)
    model.mixers[1], model.blocks[1].mixer = later.mixers[1], later.mixers[1]
    assert [found.module_path for found in said(model, x)] == ["mixers.1"]


def test_the_verdict_on_the_model_is_that_over_time():
    model = models.network(models.elman, last=True)
    found = examine(stabkit.trace(model, drawn(), check=False), probes=1)
    assert found.verdict.name == "vanishing"
    assert "time steps" in found.verdict.summary


class Alone(nn.Module):
    """One layer over time and a head on its last output: there is no depth to speak of."""

    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mixer, self.head = nn.Linear(3, models.WIDTH), make(), nn.Linear(models.WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(self.stem(x))[:, -1])


def test_a_model_without_depth_is_judged_over_time():
    found = examine(stabkit.trace(Alone(models.s4d_zoh), drawn(), check=False), probes=1)
    assert found.verdict.name == "stable"
    assert "over 39 time steps of mixer" in found.verdict.summary


def test_gates_of_a_cell_written_by_hand_may_open():
    (found,) = said(Alone(models.lstm_by_hand), drawn())
    assert (found.kind, found.severity) == ("vanishing", "warning")
    assert "gated memory cell (LSTM)" in found.evidence


def test_a_loop_of_modules_is_told_once():
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w, self.u, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 8)
            for t in range(x.shape[1]):
                h = torch.tanh(self.w(x[:, t]) + self.u(h))
            return self.head(h)

    (found,) = said(Called(), drawn())
    assert found.module_path == "u"


def test_a_model_with_scans_is_treated():
    done = stabkit.diagnosis.treat(models.network(models.min_gru, depth=1, last=True), drawn(60))
    assert done.silent
    assert [found.module_path for found in done.applied] == ["mixers.0"]


class _TwiceCalled(nn.Module):
    """A cell that is called twice with every input (pondering of a fixed length)."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(4, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        h, outputs = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            for _ in range(2):
                h = self.cell(x[:, t], h)
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


class _Gated(nn.Module):
    """A GRU written out of layers, each of which is called once a time step, and none of which puts out the state."""

    def __init__(self):
        super().__init__()
        self.z, self.g = nn.Linear(12, 8), nn.Linear(12, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        h, outputs = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            both = torch.cat([x[:, t], h], 1)
            z = torch.sigmoid(self.z(both))
            h = (1 - z) * h + z * torch.tanh(self.g(both))
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


def test_calls_are_no_time_steps_where_a_cell_is_called_twice_with_each_input():
    torch.manual_seed(0)
    model, x = _TwiceCalled().double(), torch.randn(3, 9, 4, dtype=torch.float64)
    (profile,) = time_profiles(stabkit.trace(model, x).forward_pass)
    assert profile.unit == "calls"
    assert len(profile.log_gradient) == 18


def test_what_a_gate_gives_out_is_no_state():
    torch.manual_seed(0)
    model, x = _Gated().double(), torch.randn(3, 12, 4, dtype=torch.float64)
    flow = stabkit.trace(model, x)
    assert not time_profiles(flow.forward_pass, None, loops_over_time(flow))
    summary = examine(flow, probes=1).verdict.summary
    assert "(Linear)" not in summary
    assert "along the states alone, inputs held fixed" in summary


def test_along_the_states_inputs_are_held_fixed():
    torch.manual_seed(0)
    cell = nn.LSTMCell(4, 6).double()
    x, h, c = torch.randn(10, 3, 4).double(), *torch.zeros(2, 3, 6).double()
    states = []
    for row in x:
        h, c = cell(row, (h, c))
        states.append([h, c])

    def last(h0, c0):
        for row in x[1:]:
            h0, c0 = cell(row, (h0, c0))
        return torch.cat([h0.flatten(), c0.flatten()])

    J = torch.cat(torch.autograd.functional.jacobian(last, tuple(t.detach() for t in states[0])), 2).reshape(36, 36)
    w = torch.cat([t.flatten() for t in random_of([Meta((3, 6), torch.float64, torch.device("cpu"))] * 2, seed=0)])
    assert along_states(states) == pytest.approx(float(((J.T @ w).norm() / w.norm()).log()), abs=1e-9)
    assert is_whole_state(states)
    assert not is_whole_state([[h] for h, _ in states])  # the cell gets around it
