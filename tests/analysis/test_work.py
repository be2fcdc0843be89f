"""Every step is measured once, a default report stays within its work, and the answer comes first."""

from __future__ import annotations

from collections import Counter

import pytest
import scipy.linalg
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stabkit
from stabkit.analysis import Listener
from stabkit.analysis.first_samples import of_first_samples
from stabkit.analysis.work import FEWEST, LEAST, Demand, allot, demand, operations, pays_to_shorten
from stabkit.diagnosis.depth.branches import merges
from stabkit.operators import Jacobian
from stabkit.tracing.recording.batch_parts import Call


class Residual(nn.Module):
    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.f(x)


def residual(width: int, depth: int, loud: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Residual(width, 3.0 if index == loud else 1.0) for index in range(depth)])


@pytest.fixture
def counted(monkeypatch):
    """How often a step's products are made into a matrix, and how often LAPACK is called for its eigenvalues."""
    found: Counter[str] = Counter()
    dense, eig = Jacobian.dense, scipy.linalg.eig

    def from_products(self, *args, **kwargs):
        found["dense"] += self.matrix is None
        return dense(self, *args, **kwargs)

    def decomposed(*args, **kwargs):
        found["eig"] += 1
        return eig(*args, **kwargs)

    monkeypatch.setattr(Jacobian, "dense", from_products)
    monkeypatch.setattr(scipy.linalg, "eig", decomposed)
    return found


def test_a_step_has_its_matrix_and_its_eigenvalues_computed_once(counted):
    report = stabkit.analyze(residual(12, 5), torch.randn(3, 12))
    assert all(step.z is not None for step in report.steps)
    assert all(step.attribution is not None for step in report.steps)
    assert counted == {"dense": 5, "eig": 5 * 3}  # for spectra, attribution and diagnosis together; steps and samples


def test_work_goes_to_all_alike_or_to_the_first():
    demands = [Demand(index, 1.0, 10.0, 800) for index in (4, 2, 0)]
    assert allot(demands, 3 * 8000.0) == {4: 800, 2: 800, 0: 800}
    assert allot(demands, 3 * 1000.0) == {4: 100, 2: 100, 0: 100}
    assert allot(demands, 1700.0) == {4: LEAST, 2: LEAST}
    assert allot(demands, 10.0 * FEWEST) == {4: LEAST}
    assert allot(demands, 1.0) == {4: FEWEST}
    assert allot([], 1.0) == {}


def test_a_large_model_gets_the_spectra_that_its_work_allows_and_says_what_was_left_out():
    model, x = residual(600, 6, loud=3), torch.randn(1, 600)
    cheap, again, full = (stabkit.analyze(model, x, spectrum=s) for s in ("auto", "auto", "full"))
    assert [step.z for step in cheap.steps] == [step.z for step in again.steps]
    assert any("spectra were kept cheap" in note for note in cheap.notes)
    assert not any("spectra were kept cheap" in note for note in full.notes)
    one, other = (report.steps[3].largest_singular_value for report in (cheap, full))
    assert one == pytest.approx(other, rel=0.02)
    assert all(step.spectral_radius is not None for step in full.steps)


def test_where_one_product_costs_much_of_the_work_the_largest_singular_value_alone_is_looked_for():
    torch.manual_seed(0)
    model, x = nn.LSTM(16, 16, batch_first=True), torch.randn(2, 32, 16)
    cheap, full = (stabkit.analyze(lambda x: model(x)[0], x, spectrum=s, depth="auto") for s in ("auto", "full"))
    (note,) = [note for note in cheap.notes if "spectra were kept cheap" in note]
    assert f"stop after {FEWEST} products" in note
    assert "the largest singular value alone" in note
    step, other = cheap.steps[0], full.steps[0]
    assert step.z is None
    assert step.largest_singular_value == pytest.approx(other.largest_singular_value, rel=0.03)
    assert step.largest_singular_value <= other.largest_singular_value * (1 + 1e-6)


def test_products_pass_only_the_samples_that_are_wanted():
    model, x = residual(600, 3), torch.randn(4, 600, dtype=torch.float32)
    alone, together = (stabkit.analyze(model.eval(), batch, spectrum="full") for batch in (x[:1], x))
    for one, many in zip(alone.steps, together.steps, strict=True):
        assert one.largest_singular_value == pytest.approx(many.largest_singular_value, rel=1e-5)


def test_one_sample_is_traced_alone_where_that_saves_work():
    model, x = residual(600, 3).eval(), torch.randn(4, 600)
    flow = stabkit.trace(model, x)
    short = of_first_samples(flow, model, Call((x,), {}, 0), 1, {})
    assert short.batch == 1
    demands = [demand(step) for step in flow.steps]
    assert pays_to_shorten(flow, 1, demands)
    assert not pays_to_shorten(flow, 4, demands)
    lstm, x = nn.LSTM(8, 8, batch_first=True), torch.randn(4, 64, 8)
    flow = stabkit.trace(lambda x: lstm(x)[0], x)
    assert not pays_to_shorten(flow, 1, [demand(step) for step in flow.steps])


@pytest.mark.parametrize(("training", "samples"), [(True, 1), (False, 4)])
def test_what_a_product_costs_is_found_once_for_samples_that_are_not_had_alone(monkeypatch, training, samples):
    """Also where it would pay to pass fewer: with dropout another pass is another network."""
    asked = Counter()
    monkeypatch.setattr("stabkit.analysis.work.demand", lambda step: (asked.update([step.index]), demand(step))[1])
    model = nn.Sequential(residual(600, 2), nn.Dropout(0.1)).train(training)
    x = torch.randn(4, 600)
    stabkit.analyze(model, x, spectrum_samples=samples)
    assert asked
    assert set(asked.values()) == {1}


def test_the_verdict_is_told_before_any_spectrum_and_faults_come_first():
    class Log:
        def __init__(self):
            self.events = []

        def verdict(self, diagnosis):
            self.events.append(("verdict", diagnosis.verdict.name))

        def step(self, done, total, step, seconds_left):
            self.events.append(("step", done, total, step))

    log = Log()
    assert isinstance(log, Listener)
    report = stabkit.analyze(residual(8, 5, loud=2), torch.randn(4, 8), progress=log)
    assert log.events[0] == ("verdict", report.verdict)
    assert [event[1:3] for event in log.events[1:]] == [(i, 5) for i in range(1, 6)]
    assert log.events[1][3] is not None
    assert log.events[1][3].index == max(report.steps, key=lambda step: abs(step.growth)).index
    assert sorted(event[3].index for event in log.events[1:]) == [0, 1, 2, 3, 4]
    assert {event[3].index: event[3] for event in log.events[1:]} == dict(enumerate(report.steps))


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(8, 24), fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return x + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + (q @ k.transpose(1, 2)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (lambda: Residual(8), (3, 8)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 5, 6)),
        (lambda: nn.ConvTranspose1d(4, 4, 3, padding=1), (2, 4, 7)),
        (lambda: Attention(fused=False), (2, 5, 8)),
        (lambda: Attention(fused=True), (2, 5, 8)),
        (lambda: nn.LSTM(8, 8, batch_first=True), (2, 9, 8)),
    ],
    ids=["linear", "convolution", "transposed", "attention", "fused attention", "lstm"],
)
def test_operations_are_those_that_torch_counts(block, shape):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    model = nn.Sequential(block(), block()) if shape[1:] != (9, 8) else block()
    (step, *_) = stabkit.trace((lambda x: model(x)[0]) if shape[1:] == (9, 8) else model, x).steps
    cotangents = [torch.randn(value.node._input_metadata[value.output].shape) for value in step.target.values]
    counter = FlopCounterMode(display=False)
    with counter:
        step.vjp(cotangents)
    assert operations(step) == counter.get_total_flops() > 0


def test_the_loops_over_time_of_a_recurrent_stack_are_one_field():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 20)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.embed(tokens))[0])

    torch.manual_seed(0)
    model = Tagger()
    report = stabkit.analyze(model, torch.randint(20, (2, 64)))
    assert [step.module_path for step in report.steps] == ["lstm", "head"]
    flow = stabkit.trace(model, torch.randint(20, (2, 64)))
    assert len(flow.recorded.graph.recurrent) > 700
    assert merges(flow, flow.steps[0]) == ()


def test_of_convolutions_with_the_same_operations_the_one_with_the_larger_weight_costs_more():
    costs = []
    for channels, size in ((64, 8), (256, 2)):
        model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
        (step,) = stabkit.trace(model, torch.randn(1, channels, size, size)).steps
        costs.append(demand(step))
    small, large = costs
    assert small.operations == large.operations
    assert large.cost > 2 * small.cost
