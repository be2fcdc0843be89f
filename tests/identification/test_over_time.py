"""Recurrences over time inside blocks: which method each loop, scan and hand-written cell is, and what is not said."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import Identification, identify
from stabkit.identification.record import Recurrence
from tests.identification import scan_models as models

TIMES = 14


def drawn(times: int = TIMES, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, times, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def blocks(model: nn.Module, dtype: torch.dtype = torch.float32, times: int = TIMES) -> list[Identification]:
    flow = stabkit.trace(model.to(dtype), drawn(times, dtype))
    return [r for r in identify(flow, checks=False) if flow.steps[r.steps[0]].kind == "step"]


def read(model: nn.Module, dtype: torch.dtype = torch.float32, times: int = TIMES) -> Recurrence:
    found = blocks(model, dtype, times)
    assert len(found) == 2
    (first,), _ = (record.over_time for record in found)
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", models.SCANS, ids=lambda make: make.__name__)
def test_the_method_over_time_is_that_of_the_code(make, dtype):
    name, evidence = models.SCANS[make]
    found = read(models.network(make), dtype)
    assert re.match(name, found.name)
    assert found.evidence == evidence
    assert found.module_path == "mixers.0"
    assert found.n_steps == TIMES
    assert found.residual is None or found.residual < 1e-4


def _delta(how: str, S: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The delta rule S (I - b k k^T) + b v k^T, for S of rows like v and columns like k."""
    if how == "one matrix":
        return S @ (torch.eye(k.shape[-1]) - b[..., None] * k[:, :, None] * k[:, None]) + b[..., None] * (
            v[:, :, None] * k[:, None]
        )
    if how == "einsum":
        return S - b[..., None] * torch.einsum("bv,bk->bvk", torch.einsum("bvk,bk->bv", S, k) - v, k)
    if how == "bmm":
        return S + torch.bmm((b * v)[:, :, None] - b[..., None] * torch.bmm(S, k[:, :, None]), k[:, None])
    if how == "baddbmm":
        return torch.baddbmm(S, b[..., None] * (v[:, :, None] - torch.bmm(S, k[:, :, None])), k[:, None])
    return S + (b * (v - (S * k[:, None]).sum(-1)))[:, :, None] * k[:, None]


class _Delta(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv, self.beta, self.out = how, nn.Linear(6, 12), nn.Linear(6, 1), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k, b, S, out = torch.nn.functional.normalize(k, dim=-1), self.beta(x).sigmoid(), x.new_zeros(2, 4, 4), []
        for t in range(x.shape[1]):
            S = _delta(self.how, S, k[:, t], v[:, t], b[:, t])
            out.append((S @ q[:, t, :, None]).squeeze(-1))
        return x + self.out(torch.stack(out, 1))


@pytest.mark.parametrize("how", ["one matrix", "einsum", "bmm", "baddbmm", "sums"])
def test_the_delta_rule_is_explicit_euler_however_it_is_written(how):
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(_Delta(how), _Delta(how)), torch.randn(2, 8, 6))
    found = [time for record in identify(flow, checks=False) for time in record.over_time]
    assert len(found) == 2
    assert all(time.name.startswith("forward Euler (linear, a matrix, |eigenvalues| 0.") for time in found)
    assert all(time.evidence == "measured" and time.name.endswith(" to 1)") for time in found)


_USE_AGAIN = (models.s4d_zoh, models.s4_dense_bilinear, models.ltc, models.elman, models.lstm_by_hand, models.cornn)


@pytest.mark.parametrize("make", _USE_AGAIN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("times", [4, 7])
def test_a_few_rounds_that_use_the_same_parameters_are_found(make, times):
    found = read(models.network(make), times=times)
    assert re.match(models.SCANS[make][0], found.name)
    assert found.n_steps == times


_MULTIPLIED = (models.mamba, models.mamba3, models.gla, models.min_gru, models.gated_delta)


@pytest.mark.parametrize("make", _MULTIPLIED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("times", [5, 7])
def test_a_few_rounds_that_multiply_the_state_by_slices_are_found(make, times):
    found = read(models.network(make), times=times)
    assert re.match(models.SCANS[make][0], found.name)
    assert found.n_steps == times


def test_a_few_slices_that_are_only_added_are_no_recurrence():
    class Added(nn.Module):
        """Groups of channels, each with what the one before gave: nothing multiplies what is carried."""

        def forward(self, x):
            y, out = torch.zeros_like(x[:, 0]), []
            for piece in x.unbind(1):
                y = torch.tanh(piece + y)
                out.append(y)
            return x + torch.stack(out, 1)

    flow = stabkit.trace(nn.Sequential(Added(), Added()), torch.randn(2, 5, 3))
    assert not any(record.over_time for record in identify(flow, checks=False))


def test_a_few_rounds_with_other_numbers_each_are_no_recurrence():
    class Grouped(nn.Module):
        """Groups of channels, each convolved with what the one before gave (Res2Net)."""

        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(3, 3) for _ in range(5)])

        def forward(self, x):
            y, out = torch.zeros_like(x[:, 0]), []
            for part, piece in zip(self.parts, x.unbind(1), strict=True):
                y = torch.tanh(part(piece + y))
                out.append(y)
            return x + torch.stack(out, 1)

    flow = stabkit.trace(nn.Sequential(Grouped(), Grouped()), torch.randn(2, 5, 3))
    assert not any(record.over_time for record in identify(flow, checks=False))


@pytest.mark.parametrize("make", [models.mamba, models.elman, models.linoss_im], ids=lambda make: make.__name__)
def test_depth_is_read_as_before_and_notes_tell_of_time(make):
    for record in blocks(models.network(make)):
        assert record.name.startswith("forward Euler")
        assert record.evidence == "proven"
        assert any(note.startswith("over time, ") for note in record.notes)


def test_the_numbers_of_a_discretisation_are_those_of_its_formula():
    model = models.network(models.s4d_bilinear).double()
    m = model.mixers[0]
    z = torch.exp(m.log_dt)[:, None] * torch.complex(-torch.exp(m.log_real), m.imag)
    sizes = ((1 + z / 2) / (1 - z / 2)).abs().detach()
    found = read(model, torch.float64)
    assert (found.low, found.high) == pytest.approx((float(sizes.min()), float(sizes.max())))
    assert found.method.stability_matrix(np.array([-1.0]))[0, 0, 0] == pytest.approx(1 / 3)


def test_an_implicit_oscillator_damps_what_a_symplectic_one_keeps():
    implicit, explicit = (read(models.network(m), torch.float64) for m in (models.linoss_im, models.linoss_imex))
    m = models.network(models.linoss_im).double().mixers[0]
    sizes = (1 + torch.sigmoid(m.dt) ** 2 * torch.relu(m.A)).rsqrt().detach()
    assert (implicit.low, implicit.high) == pytest.approx((float(sizes.min()), float(sizes.max())))
    assert (explicit.low, explicit.high) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("make", [*models.CLOSED, models.retnet_parallel, models.each_alone])
def test_nothing_is_read_where_there_is_no_chain_of_states(make):
    for record in blocks(models.network(make)):
        assert record.over_time == ()
        assert record.name == "forward Euler"


@pytest.mark.parametrize("make", models.CLOSED, ids=lambda make: make.__name__)
def test_a_recurrence_in_closed_form_is_said_not_to_be_read(make):
    for record in blocks(models.network(make), torch.float32, 24):
        (note,) = [n for n in record.notes if "not read over time" in n]
        assert note.startswith("axis 1 is passed causally")


def test_what_is_not_causal_is_no_recurrence_in_closed_form():
    class Spectral(nn.Module):
        """A circular convolution, which every time takes all of the others in."""

        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.randn(13, models.WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.k, n=x.shape[1], dim=1)

    for record in blocks(models.network(Spectral), torch.float32, 24):
        assert not any("over time" in note for note in record.notes)


def test_gradients_change_over_time_steps_as_the_formula_has_it():
    model = models.network(models.retnet).double()
    found = read(model, torch.float64)
    assert found.growth == pytest.approx(np.log(0.9))


def test_two_scans_of_one_layer_are_two():
    (first, second), _ = (record.over_time for record in blocks(models.network(models.bidirectional)))
    assert first.name != second.name
    assert all(found.name.startswith("linear recurrence") for found in (first, second))


def test_what_the_input_chooses_is_not_called_proven():
    class Chosen(nn.Module):
        """A decay of one number, which is made of the input."""

        def forward(self, x: Tensor) -> Tensor:
            a, h, out = torch.sigmoid(x.mean(dim=(1, 2)))[:, None], x.new_zeros(len(x), models.WIDTH), []
            for t in range(x.shape[1]):
                h = a * h + x[:, t]
                out.append(h)
            return torch.stack(out, 1)

    assert read(models.network(Chosen)).evidence == "measured"


class Layers(nn.Module):
    """As many layers as there are slices of what they are given: depth, with parameters of their own."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(models.WIDTH, models.WIDTH) for _ in range(1 if tied else TIMES))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(TIMES):
            h = torch.tanh(self.layers[t % len(self.layers)](h) + x[:, t])
        return x + h[:, None]


@pytest.mark.parametrize("tied", [True, False])
def test_layers_with_weights_of_their_own_are_no_recurrence(tied):
    assert [len(record.over_time) for record in blocks(models.network(lambda: Layers(tied)))] == [tied, tied]


def test_a_model_that_writes_to_its_weights_keeps_its_graph():
    """The histories of factors are seen in a second run, which must not spoil what the first one saved."""

    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.s4d_real()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.inner.parts[0].weight.div_(1.0)
            return self.inner(x)

    model = models.network(Rescaled)
    flow = stabkit.trace(model, drawn())
    assert [len(r.over_time) for r in identify(flow, checks=False)] == [0, 1, 1, 0]
    assert flow.jacobian().dense().isfinite().all()


def test_records_are_plain_data():
    (record, *_) = blocks(models.network(models.mamba))
    told = record.to_dict()["over_time"]
    assert told[0]["name"].startswith("exponential step")


def test_the_reports_of_steps_tell_of_time():
    report = stabkit.analyze(models.network(models.s4d_zoh), drawn(), spectrum="none")
    assert any("over time, 14 steps of mixers.0: exponential step" in note for note in report.steps[1].notes)


class Scanned(nn.Module):
    """A state-space layer that is the whole model, so that its steps are those over time."""

    def __init__(self, rule):
        super().__init__()
        self.A, self.dt, self.rule = nn.Parameter(torch.rand(4) + 0.2), nn.Parameter(torch.rand(4)), rule
        self.B, self.C = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, u):
        dt = nn.functional.softplus(self.dt)
        z = -dt * self.A
        a, b = {
            "exponential": lambda: (z.exp(), (1 - z.exp()) / self.A),
            "bilinear": lambda: ((1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)),
            "backward": lambda: (1 / (1 - z), dt / (1 - z)),
        }[self.rule]()
        h, out = torch.zeros(len(u), 4).to(u), []
        for t in range(u.shape[1]):
            h = a * h + b * self.B(u[:, t])
            out.append(self.C(h))
        return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("exponential", "exponential step (exact in the state"),
        ("bilinear", "trapezoid (bilinear"),
        ("backward", "backward Euler (linear"),
    ],
)
def test_steps_over_time_have_the_name_that_their_factors_were_made_by(rule, name):
    torch.manual_seed(0)
    flow = stabkit.trace(Scanned(rule).double(), torch.randn(2, 8, 3, dtype=torch.float64))
    found = [r for r in identify(flow, checks=False) if r.name not in ("fork", "join")]
    assert len(found) > 4
    sure = "proven" if rule == "exponential" else "measured"  # that of exp is in the operation
    assert all(r.name.startswith(name) and r.evidence == sure for r in found)


def test_slices_that_another_recurrence_carries_are_no_inputs_of_this_one():
    """The weights of RWKV are divided by a running maximum, which holds the keys of all times before."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v = nn.Linear(models.WIDTH, models.WIDTH), nn.Linear(models.WIDTH, models.WIDTH)
            self.decay = nn.Parameter(torch.randn(models.WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            keys, values, out = self.k(x), self.v(x), []
            total, top = torch.zeros_like(keys[:, 0]), torch.full_like(keys[:, 0], -1e38)
            for k, v in zip(keys.unbind(1), values.unbind(1), strict=True):
                faded = top - torch.exp(self.decay)
                top = torch.maximum(faded, k)
                total = torch.exp(faded - top) * total + torch.exp(k - top) * v
                out.append(total)
            return torch.tanh(torch.stack(out, 1))

    model = models.network(Weighted)
    decays = [torch.exp(-torch.exp(m.decay)).detach() for m in model.modules() if isinstance(m, Weighted)]
    records = blocks(model)
    assert len(records) == len(decays)
    for record, a in zip(records, decays, strict=True):
        found = sorted(record.over_time, key=lambda r: r.name)
        assert [r.name.partition(" (")[0] for r in found] == ["linear recurrence", "maximum over time"]
        assert found[0].low == pytest.approx(float(a.min()), rel=1e-3)
        assert found[0].high == pytest.approx(float(a.max()), rel=1e-3)
        assert all(r.growth is None for r in found)  # of what is stored, which changes with its units
        assert not any("successive times" in note for r in found for note in r.notes)


def test_numbers_that_a_running_maximum_and_the_input_make_are_not_told():
    """The memory of an mLSTM: its forget gate is made of the input, and stored in units of the maximum."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v, self.f, self.i = (nn.Linear(models.WIDTH, models.WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            k, v, i, f = self.k(x), self.v(x), self.i(x), nn.functional.logsigmoid(self.f(x))
            c, m, out = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
            for t in range(x.shape[1]):
                new = torch.maximum(f[:, t] + m, i[:, t])
                c = torch.exp(f[:, t] + m - new) * c + torch.exp(i[:, t] - new) * k[:, t] * v[:, t]
                m = new
                out.append(c)
            return torch.stack(out, 1)

    for record in blocks(models.network(Memory)):
        found = next(r for r in record.over_time if not r.name.startswith("maximum"))
        assert (found.name, found.low, found.growth) == ("linear recurrence (rescaled)", None, None)


TORCH_LAYERS = [
    (lambda: nn.RNN(3, 6, batch_first=True), ["plain"]),
    (lambda: nn.GRU(3, 6, batch_first=True), ["gated Euler"]),
    (lambda: nn.GRU(3, 6, batch_first=True, bidirectional=True), ["gated Euler"] * 2),
    (lambda: nn.LSTM(3, 6, batch_first=True), ["gated memory cell"]),
    (lambda: nn.LSTM(3, 6, batch_first=True, num_layers=2), ["gated memory cell"] * 2),
]


class Reader(nn.Module):
    def __init__(self, layers: nn.RNNBase, *, embeds: bool) -> None:
        super().__init__()
        self.embeds, self.first = embeds, nn.Linear(3, 3) if embeds else nn.Identity()
        self.layers = layers
        self.head = nn.Linear(6 * (1 + layers.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layers(self.first(x))[0]
        return self.head(outputs.mean(1) if self.embeds else outputs[:, -1])


@pytest.mark.parametrize(("make", "names"), TORCH_LAYERS)
def test_recurrent_layers_of_torch_inside_a_model_are_read_over_time(make, names):
    torch.manual_seed(0)
    records = identify(stabkit.trace(Reader(make(), embeds=True), drawn()), checks=False)
    record = next(r for r in records if r.over_time)
    assert [found.name.partition(" (")[0] for found in record.over_time] == names
    assert all(found.n_steps == TIMES and found.module_path == "layers" for found in record.over_time)
    assert not any("residual addition" in note for note in record.notes)


@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 6, batch_first=True), lambda: nn.LSTM(3, 6, batch_first=True)])
def test_time_steps_of_a_layer_that_is_cut_in_time_are_no_plain_maps(make):
    torch.manual_seed(0)
    records = identify(stabkit.trace(Reader(make(), embeds=False), drawn()), checks=False)
    names = {record.name.partition(" (")[0] for record in records[:-1]}
    assert len(records) >= TIMES - 1
    assert names == {"gated Euler" if isinstance(make(), nn.GRU) else "gated memory cell"}
    assert not any("where ," in note for record in records for note in record.notes)


def test_a_step_that_takes_a_chunk_of_times_is_told_as_that():
    """Retention by chunks (Sun et al. 2023): the state decays by gamma^4 a step, of which each takes 4 times."""
    gamma = 1 - 2.0 ** -torch.tensor([5.0, 6.0])

    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v, self.q = (nn.Linear(models.WIDTH, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            k, v, q = (one(x).unflatten(-1, (2, 2)).transpose(1, 2) for one in (self.k, self.v, self.q))
            S, out = x.new_zeros(len(x), 2, 2, 2), []
            for start in range(0, x.shape[1], 4):
                a, b, c = (each[:, :, start : start + 4] for each in (k, v, q))
                out.append((c @ S).transpose(1, 2).flatten(2))
                S = (gamma**4)[:, None, None].to(S) * S + a.transpose(-1, -2) @ b
            return torch.cat(out, 1).repeat(1, 1, models.WIDTH // 4 + 1)[..., : models.WIDTH]

    torch.manual_seed(0)
    found = [r for record in identify(stabkit.trace(models.network(Chunks), drawn(36))) for r in record.over_time]
    assert found
    assert {(round(r.low, 4), round(r.high, 4)) for r in found} == {tuple(round(float(g), 4) for g in gamma**4)}
    assert all("a step is a chunk, of 4 times" in r.notes for r in found)
    assert not any("a time step" in note for r in found for note in r.notes)
