"""A step made anew of the tableau and the recorded fields is the step, or its numbers are withdrawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabkit import trace
from stabkit.identification import identify
from stabkit.identification.evidence.reproduction import confirmed, deviation
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.reading import read
from tests.identification.family import Step


def mlp(width=5):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def heun(m, x):
    first = m.parts[0](x)
    return x + 0.3 * (first + m.parts[0](x + 0.6 * first))


STEPS = {
    "euler": lambda m, x: x - 0.4 * m.parts[0](x),
    "heun": heun,
    "two sums": lambda m, x: (y := x + m.parts[0](x)) + 0.5 * m.parts[1](y),
    "addmm": lambda m, x: torch.addmm(x, x, m.parts[0][0].weight, alpha=0.5),
}


def second(step):
    torch.manual_seed(0)
    model = nn.Sequential(*[Step(step, mlp(), mlp()) for _ in range(3)]).double()
    around = Surroundings(trace(model, torch.randn(4, 5).double(), depth=["0", "1", "2"]))
    return read(around, 1, 2), around.whole(1, 2, around.slots(1, 2))


@pytest.mark.parametrize("step", STEPS)
def test_a_proven_step_is_made_anew_of_its_fields(step):
    record, piece = second(STEPS[step])
    assert record.evidence == "proven"
    away = deviation(piece, record.method, record.recorded)
    assert (away is None and step == "addmm") or away < 1e-12


@pytest.mark.parametrize("step", ["euler", "heun", "two sums"])
@pytest.mark.parametrize("block", ["B", "U", "V"])
def test_a_wrong_number_is_withdrawn(step, block):
    record, piece = second(STEPS[step])
    method = record.method
    parts = {name: np.array(getattr(method, name)) for name in ("A", "U", "B", "V")}
    parts[block] = parts[block] * 1.5
    wrong = type(method)(parts["A"], parts["U"], parts["B"], parts["V"], fields=method.fields)
    found = confirmed(replace(record, method=wrong), piece)
    assert (found.evidence, found.step_size) == ("measured", None)
    assert "no number is claimed" in found.notes[0]


def test_two_states_are_made_anew_as_well():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = mlp(), mlp()

        def forward(self, x, v):
            v = 0.9 * v + 0.2 * self.f(x)
            return x + 0.5 * v, v

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(4)])

        def forward(self, x):
            v = torch.sin(x)
            for block in self.blocks:
                x, v = block(x, v)
            return x

    torch.manual_seed(0)
    around = Surroundings(trace(Chain().double(), torch.randn(4, 5).double()))
    record = read(around, 2, 3)
    assert record.evidence == "proven"
    assert record.method.states == 2
    assert record.step_size is not None
    away = deviation(around.whole(2, 3, around.slots(2, 3)), record.method, record.recorded)
    assert away is not None
    assert away < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_roundings_of_a_coarse_dtype_withdraw_nothing(dtype: torch.dtype):
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))

    class Euler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = field

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    flow = trace(nn.Sequential(Euler(), Euler()).to(dtype), torch.randn(4, 32).to(dtype))
    for checks in (False, True):
        assert {(r.name, r.evidence, r.step_size) for r in identify(flow, checks=checks)} == {
            ("forward Euler", "proven", 1.0)
        }
