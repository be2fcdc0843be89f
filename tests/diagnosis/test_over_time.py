"""Recurrent modules inside a model are judged over time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Finding, Thresholds, examine
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.over_time.findings import loops_over_time, time_findings, time_profiles
from stabkit.diagnosis.over_time.profile import TimeProfile
from stabkit.diagnosis.remedies.learning import left_by_a_constant
from stabkit.errors import TraceError
from stabkit.tracing.recording.forward_pass import ForwardPass


class Reader(nn.Module):
    """Tokens, a recurrent module, a head on the last output or on all."""

    def __init__(self, kind: type[nn.RNNBase], last: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.inner = nn.Embedding(10, 8), kind(8, 12, batch_first=True, **options)
        self.head, self.last = nn.Linear(12, 2), last

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.inner(self.embed(tokens))[0]
        return self.head(out[:, -1] if self.last else out)


class Loop(nn.Module):
    """A cell called in a loop, and a head on its last state."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cell, self.head = kind(8, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def tokens(time: int = 40) -> Tensor:
    return torch.randint(0, 10, (2, time), generator=torch.Generator().manual_seed(2))


def said(model: nn.Module, x: Tensor) -> list[Finding]:
    return time_findings(stabkit.trace(model, x, check=False), None, Thresholds())


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_short_memory_before_a_head_on_the_last_output_vanishes_over_time(kind):
    model, x = Reader(kind), tokens(60)
    (found,) = said(model, x)
    assert (found.kind, found.module_path) == ("vanishing", "inner")
    assert found.severity in ("warning", "critical")
    embedded = model.embed(x).detach().requires_grad_()
    out = model.head(model.inner(embedded)[0][:, -1])
    (gradient,) = torch.autograd.grad(out.sum(), embedded)
    sizes = gradient.norm(dim=(0, 2)).log()
    assert found.numbers["growth_over_time"] == pytest.approx(float(sizes[:7].max() - sizes[-7:].max()), abs=2.5)
    assert "tried on a copy" in found.evidence


def test_the_verdict_on_the_model_is_that_over_time():
    found = examine(stabkit.trace(Reader(nn.RNN), tokens(24), check=False), probes=1)
    assert (found.verdict.name, found.findings[0].module_path) == ("vanishing", "inner")
    assert "time steps" in found.verdict.summary


def test_the_remedy_that_is_told_works():
    model, x = Reader(nn.LSTM), tokens(60)
    (found,) = said(model, x)
    assert "log(60 - 1) = 4.08" in found.remedy
    model.inner.bias_hh_l0.data[12:24] = 4.08
    assert said(model, x) == []


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_loop_of_cells_is_judged_by_its_states(kind):
    (found,) = said(Loop(kind), torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(2)))
    assert (found.kind, found.module_path) == ("vanishing", "cell")


class Own(nn.Module):
    """A recurrence written by hand: a cell module, its layers in the loop, or the input projected before it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.w, self.u, self.head = how, nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.cell = Cell(nn.Linear(4, 12), nn.Linear(12, 12)) if how == "cell" else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 12)
        x = self.w(x) if self.how == "projected" else x
        pieces = x.unbind(1) if self.how == "unbound" else None
        for t in range(x.shape[1]):
            if pieces is not None:
                h = torch.tanh(self.w(pieces[t]) + self.u(h))
            elif self.cell is not None:
                h = self.cell(x[:, t], h)
            else:
                h = torch.tanh((x[:, t] if self.how == "projected" else self.w(x[:, t])) + self.u(h))
        return self.head(h)


class Cell(nn.Module):
    def __init__(self, w: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.w, self.u = w, u

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(x) + self.u(h))


class Again(nn.Module):
    """One layer used again over depth, beside the same input each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(12):
            z = torch.tanh(self.u(z) + x)
        return z


@pytest.mark.parametrize(("how", "place"), [("cell", "cell"), ("inline", "u"), ("projected", "u"), ("unbound", "u")])
def test_a_recurrence_written_by_hand_is_judged_over_time(how, place):
    model, x = Own(how), torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(2))
    (found,) = said(model, x)
    assert (found.kind, found.module_path) == ("vanishing", place)
    assert "tried on a copy" in found.evidence
    stabkit.diagnosis.apply(model, found)
    assert said(model, x) == []


class Gated(nn.Module):
    """An LSTM or GRU cell written by hand, its gates stacked in rows or in columns, its matrices called by any name."""

    def __init__(self, how: str, std: float, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        gates = 3 if how == "gru" else 4
        if how == "one layer":
            self.both = nn.Linear(4 + width, gates * width)
        elif how == "layers":
            self.of_input, self.of_state = nn.Linear(4, gates * width), nn.Linear(width, gates * width)
        else:
            self.A = nn.Parameter(torch.empty(4, gates * width))
            self.B = nn.Parameter(torch.empty(width, gates * width))
            self.c = nn.Parameter(torch.empty(gates * width))
        for p in self.parameters():
            nn.init.normal_(p, std=std)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        if self.how == "gru":
            (rx, zx, nx), (rh, zh, nh) = (x @ self.A + self.c).chunk(3, 1), (h @ self.B).chunk(3, 1)
            z = torch.sigmoid(zx + zh)
            return (1 - z) * torch.tanh(nx + torch.sigmoid(rx + rh) * nh) + z * h, c
        if self.how == "one layer":
            gates = self.both(torch.cat([x, h], 1))
        elif self.how == "layers":
            gates = self.of_input(x) + self.of_state(h)
        else:
            gates = x @ self.A + h @ self.B + self.c
        i, f, g, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Strips(nn.Module):
    """A cell in a loop over the pieces of its input, and a head on its last state."""

    def __init__(self, cell: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.cell, self.head, self.width = cell, nn.Linear(width, 2), width

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(len(x), self.width),) * 2
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])


@pytest.mark.parametrize(
    ("how", "std", "time", "kind"),
    [
        ("columns", 1.5, 24, "exploding"),
        ("layers", 1.5, 24, "exploding"),
        ("one layer", 1.5, 24, "exploding"),
        ("gru", 1.5, 24, "exploding"),
        ("columns", 1e-3, 16, "vanishing"),
        ("one layer", 1e-3, 16, "vanishing"),
    ],
)
def test_the_matrices_of_a_cell_written_by_hand_are_brought_to_a_size_that_serves_it(how, std, time, kind):
    model = Strips(Gated(how, std, 64), 64)
    x = torch.rand(4, time, 4, generator=torch.Generator().manual_seed(2))
    (found,) = said(model, x)
    assert (found.kind, found.module_path) == (kind, "cell")
    assert {a["action"] for a in found.actions} == {"scale"}
    assert all((a["factor"] < 1.0) == (kind == "exploding") for a in found.actions)
    assert "hidden units" in found.remedy
    stabkit.diagnosis.apply(model, found)
    assert said(model, x) == []


@pytest.mark.parametrize("how", ["columns", "layers", "gru"])
def test_the_gate_that_keeps_the_state_is_found_by_opening_one_after_another(how):
    model = Strips(Gated(how, 0.1))
    x = torch.randn(4, 50, 4, generator=torch.Generator().manual_seed(2))
    (found,) = said(model, x)
    (action,) = found.actions
    assert (found.kind, action["action"], action["start"]) == ("vanishing", "fill", 24)
    stabkit.diagnosis.apply(model, found)
    assert said(model, x) == []


def test_a_cell_that_reads_its_tokens_itself_is_told_once():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.cell, self.head = nn.Embedding(9, 8), nn.RNNCell(8, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = None
            for t in range(x.shape[1]):
                h = self.cell(self.embed(x[:, t]), h)
            return self.head(h)

    found = examine(stabkit.trace(Tokens(), tokens(40) % 9, check=False), probes=1).findings
    (told,) = [f for f in found if f.severity != "info"]
    assert (told.module_path, "time_steps" in told.numbers) == ("cell", True)
    assert any("this is what is found over time at cell" in f.evidence for f in found)


def test_a_layer_used_again_over_depth_is_no_loop_over_time():
    assert loops_over_time(stabkit.trace(Again(), torch.randn(3, 12), check=False)) == ()


class Scales(nn.Module):
    """Res2Net: layers of their own on strips of the channels, one activation for all (Gao et al., 2019)."""

    def __init__(self, scale: int = 9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.act = nn.ModuleList(nn.Linear(4, 4) for _ in range(scale)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        strip, made = torch.zeros(()), []
        for layer, piece in zip(self.layers, x.split(4, 1), strict=True):
            strip = self.act(layer(strip + piece))
            made.append(strip)
        return torch.cat(made, 1)


class Bare(nn.Module):
    """A recurrence of parameters, whose only module is its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U, self.act = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4)), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(())
        for piece in x.split(4, 1):
            h = self.act(piece @ self.W + 0.3 * h @ self.U if h.dim() else piece @ self.W)
        return h


def test_an_activation_shared_by_layers_on_strips_is_no_loop_over_time():
    x = torch.randn(2, 36)
    assert loops_over_time(stabkit.trace(nn.Sequential(Scales(), nn.Linear(36, 2)), x, check=False)) == ()
    assert loops_over_time(stabkit.trace(nn.Sequential(Bare(), nn.Linear(4, 2)), x, check=False)) == ("0.act",)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_model_is_treated_over_time(kind):
    done = stabkit.diagnosis.treat(Reader(kind), tokens(40))
    assert done.silent
    assert [found.module_path for found in done.applied] == ["inner"]


def test_recurrent_weights_that_are_too_large_explode_over_time():
    model = Reader(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        model.inner.weight_hh_l0.copy_(2.2 * torch.linalg.qr(torch.randn(12, 12))[0])
    (found,) = said(model, tokens())
    assert (found.kind, found.module_path) == ("exploding", "inner")
    assert "weight_hh" in found.remedy
    assert "tried on a copy" in found.evidence


@pytest.mark.parametrize(
    "model",
    [
        Reader(nn.LSTM, last=False),  # a language model: every step has its own loss
        Reader(nn.RNN, last=False),
    ],
)
def test_a_model_that_reads_every_output_is_reached_everywhere(model):
    assert said(model, tokens(60)) == []


def test_short_sequences_and_models_without_time_are_not_judged():
    assert said(Reader(nn.LSTM), tokens(7)) == []
    plain = nn.Linear(3, 2)
    assert time_profiles(ForwardPass(plain, plain, (torch.ones(2, 3),), {}, 0)) == []


def test_the_flow_over_time_of_a_model_is_that_of_its_recurrent_module():
    model, x = Reader(nn.RNN), tokens()
    whole = stabkit.recurrent_flow(model, x)
    alone = stabkit.recurrent_flow(model.inner, model.embed(x).detach())
    assert [s.size for s in whole.states] == [s.size for s in alone.states]
    for flow in (whole, alone):
        assert stabkit.gradient_profile(flow).log_growth.sum(0).mean() < -10
    two = nn.Sequential(model.embed, nn.LSTM(8, 8, batch_first=True))
    two.forward = lambda t: two[1](two[1](two[0](t))[0])[0]
    with pytest.raises(TraceError, match="several recurrent modules"):
        stabkit.recurrent_flow(two, x)


class Recall(nn.Module):
    """What is read is the last state: the first symbol, after a tail that is the same for all samples."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = getattr(nn, cell)(4, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("cell", ["RNN", "GRU"])
def test_samples_that_a_vanishing_memory_makes_alike_are_no_finding_of_their_own(cell):
    labels = torch.arange(32) % 4
    x = (0.05 * torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(1))).repeat(32, 1, 1)
    x[:, 0] += 2 * nn.functional.one_hot(labels, 4)
    findings = examine(stabkit.trace(Recall(cell), x), lambda out: nn.functional.cross_entropy(out, labels)).findings
    (found,) = [f for f in findings if serious(f)]
    assert (found.kind, found.module_path) == ("vanishing", "rnn")
    (alike,) = [f for f in findings if f.kind == "rank_collapse"]
    assert "gone with the remedy of vanishing at rnn" in alike.evidence


@pytest.mark.parametrize(
    ("model", "time", "name"),
    [
        (Reader(nn.LSTM, last=False), 40, "stable"),
        (Reader(nn.LSTM), 20, "drift"),  # its gates are half shut, and open while it trains
        (Reader(nn.LSTM), 7, "not judged"),
        (nn.Sequential(nn.Linear(40, 3)), 40, "not judged"),
    ],
)
def test_a_recurrent_model_is_judged_over_time_where_depth_is_too_little(model: nn.Module, time: int, name: str):
    x = torch.randn(2, 40) if isinstance(model, nn.Sequential) else tokens(time)
    found = examine(stabkit.trace(model, x, check=False), probes=1)
    assert found.verdict.name == name
    assert ("over time" in found.verdict.summary) is (name != "not judged")
    assert not [f for f in found.findings if f.severity != "info"]


def test_time_is_counted_from_the_newest_step_that_a_gradient_reaches():
    reached = TimeProfile("r", nn.Identity(), np.array([*np.linspace(-3.0, 0.0, 12), -math.inf]))
    assert reached.growth == pytest.approx(-3.0)
    few = TimeProfile("r", nn.Identity(), np.array([0.0] * 4 + [-math.inf] * 9))
    assert math.isnan(few.growth)


def _last_of_recent(back: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(64, 40, 1, generator=torch.Generator().manual_seed(0))
    return drawn, drawn[:, -1 - back]


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize(("back", "severity"), [(0, "info"), (35, "warning")])
def test_a_short_memory_is_a_warning_where_the_targets_ask_for_a_longer_one(back, severity):
    torch.manual_seed(0)
    x, y = _last_of_recent(back)
    report = stabkit.analyze(Forecaster(), x, loss=lambda out: (out - y).square().mean(), spectrum="none")
    found = [f for f in report.findings if f.kind == "vanishing" and f.module_path == "lstm"]
    assert [f.severity for f in found] == [severity]
    assert ("what these samples ask for does not lie that far back" in found[0].evidence) == (severity == "info")


def test_the_best_constant_is_the_mean_or_the_shares_of_the_classes():
    y = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left = left_by_a_constant(lambda out: (out - y).square().mean(), torch.zeros_like(y))
    assert left == pytest.approx(float(y.var(0, correction=0).mean()))
    classes = torch.tensor([0] * 15 + [1] * 5)
    left = left_by_a_constant(lambda out: nn.functional.cross_entropy(out, classes), torch.zeros(20, 2))
    assert left == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-5)
    assert left_by_a_constant(lambda out: out[0].sum(), (y, y)) is None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_best_constant_is_as_good_in_any_units_of_the_loss(scale: float):
    y = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left = left_by_a_constant(lambda out: scale * (out - y).square().mean(), 5 + torch.zeros_like(y))
    assert left == pytest.approx(scale * float(y.var(0, correction=0).mean()))
