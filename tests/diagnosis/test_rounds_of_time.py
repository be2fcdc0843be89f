from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import stabkit
from stabkit.diagnosis.measurement import StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies


class Spike(torch.autograd.Function):
    """A step, with the slope of a fast sigmoid in its place."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + 10 * x.abs()) ** 2


class Spiking(nn.Module):
    """Neurons that leak and are reset, whose readout is kept at every time: the state grows with every round."""

    def __init__(self, recurrent=True, leak=0.5):
        super().__init__()
        self.into, self.out = nn.Linear(4, 12), nn.Linear(12, 3)
        self.around = nn.Linear(12, 12) if recurrent else None
        self.leak = leak

    def forward(self, x):
        v = z = x.new_zeros(x.shape[1], 12)
        kept = []
        for now in x:
            v = self.leak * v * (1 - z) + self.into(now)
            if self.around is not None:
                v = v + self.around(z)
            z = Spike.apply(v - 1)
            kept.append(self.out(z))
        return torch.stack(kept)


def growth_over_time(model, x):
    """The log of the gradient norm at the first state that depends on another over that at the last, by autograd."""
    model, kept = model.double(), []
    v = z = x.new_zeros(x.shape[1], 12, dtype=torch.float64)
    for now in x.double():
        v = model.leak * v * (1 - z) + model.into(now) + (0 if model.around is None else model.around(z))
        v.retain_grad()
        kept.append(v)
        z = Spike.apply(v - 1)
    model.out(z).square().mean().backward()
    first, last = (state.grad.norm().log() for state in (kept[1], kept[-1]))
    return float(first - last)


@pytest.mark.parametrize(
    ("recurrent", "leak", "size", "verdict", "remedy"),
    [
        (True, 0.1, 30.0, "vanishing", "use factors of the state nearer to 1"),
        (False, 0.9, 0.1, "drift", ""),
        (False, 0.1, 30.0, "vanishing", "use factors of the state nearer to 1"),
    ],
)
def test_rounds_that_keep_what_they_put_out_are_judged_over_time(recurrent, leak, size, verdict, remedy):
    torch.manual_seed(0)
    model, x = Spiking(recurrent, leak), torch.randn(12, 2, 4) * size
    report = stabkit.analyze(model, x, loss=lambda out: out[-1].square().mean(), batch_dim=1)
    assert "step" not in [step.kind for step in report.steps]
    assert report.verdict == verdict
    told = set(
        re.findall(r"(?:a factor of|state is) (?:10\^(-\d+)|([\d.]+)) (?:on|times that at the last)", str(report))
    )
    ((power, plain),) = told
    found = math.log(10.0) * int(power) if power else math.log(float(plain))
    assert found == pytest.approx(growth_over_time(model, x), rel=0.05)
    assert [finding.kind for finding in report.findings] == ([verdict] if remedy else [])
    assert all(remedy in finding.remedy for finding in report.findings)


def test_rounds_are_not_counted_since_the_first_and_the_last_begin_and_end_elsewhere(monkeypatch):
    monkeypatch.setattr("stabkit.diagnosis.causes.judged_over_time", lambda flow, verdict, *_: verdict)
    monkeypatch.setattr("stabkit.diagnosis.causes.time_findings", lambda *_: [])
    torch.manual_seed(0)
    x = torch.randn(12, 2, 4) * 30
    report = stabkit.analyze(Spiking(True, 0.1), x, loss=lambda out: out[-1].square().mean(), batch_dim=1)
    assert report.verdict == "not judged"
    assert "most of the" in str(report)
    assert not re.search(r"\d+ of \d+ steps are rounds|change their space", str(report))


def test_plain_layers_that_change_their_space_are_judged():
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width - 1)

        def forward(self, x):
            return self.linear(x).tanh()

    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(width) for width in range(12, 4, -1)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)
    depth = [str(i) for i in range(8)]
    report = stabkit.analyze(model, torch.randn(8, 12), loss=lambda out: out.square().mean(), depth=depth)
    assert [step.kind for step in report.steps] == ["transition"] * 8
    assert report.verdict == "vanishing"


@pytest.mark.parametrize(("norms", "word"), [(1, "norms"), (0, "old state")])
def test_a_remedy_names_what_there_is(norms, word):
    step = StepMeasurement(0, "0", "0", "Block", "step", (((4,),), ((4,),)), torch.zeros(2).numpy(), 0.0, norms=norms)
    assert word in remedies._on_the_skip([step])


class Guess(nn.Module):
    """A network whose hidden units are scaled and shifted by parts of one value."""

    def __init__(self):
        super().__init__()
        self.into, self.scales, self.out = nn.Linear(8, 16), nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x):
        scale, shift = self.scales(x).chunk(2, dim=-1)
        return self.out(torch.tanh(self.into(x) * (1 + scale) + shift))


class Sampler(nn.Module):
    """The end of a state is guessed and clipped, as samplers do; the state is carried on around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.guess = Guess()

    def forward(self, x):
        for number in range(12):
            x = 0.95 * x + 0.05 * (self.guess(x) + (50.0 if number < 2 else 0.0)).clamp(-1, 1)
        return x


def test_a_state_that_is_carried_on_around_a_clipped_guess_does_not_vanish():
    report = stabkit.analyze(Sampler(), torch.randn(4, 8), spectrum="none")
    assert "nothing at all of the gradient" not in str(report)
    assert "vanishing" not in [finding.kind for finding in report.findings]
