from __future__ import annotations

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


@pytest.mark.parametrize(
    ("recurrent", "leak", "size", "verdict", "kinds"),
    [
        (True, 0.1, 30.0, "vanishing", ["vanishing"]),
        (False, 0.9, 0.1, "drift", []),
        (False, 0.1, 30.0, "vanishing", ["vanishing"]),
    ],
)
def test_rounds_that_keep_what_they_put_out_are_not_judged_by_depth(recurrent, leak, size, verdict, kinds):
    torch.manual_seed(0)
    report = stabkit.analyze(
        Spiking(recurrent, leak), torch.randn(12, 2, 4) * size, loss=lambda out: out[-1].square().mean(), batch_dim=1
    )
    assert "step" not in [step.kind for step in report.steps]
    assert report.verdict == verdict
    assert "time steps" in str(report)
    assert [finding.kind for finding in report.findings] == kinds
    assert not any("norm" in finding.remedy for finding in report.findings)


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
