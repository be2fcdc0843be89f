"""Recurrent networks over time and other maps that are applied again and again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stabkit
from stabkit.identification import by_step, identify

WIDTH = 5


def recurrent(module):
    torch.manual_seed(0)
    return identify(stabkit.recurrent_flow(module.double(), torch.randn(4, 2, 3, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.RNN(3, WIDTH), "plain"),
        (nn.GRU(3, WIDTH), "gated Euler"),
        (nn.GRUCell(3, WIDTH), "gated Euler"),
        (nn.LSTM(3, WIDTH), "gated memory cell (LSTM)"),
        (nn.LSTMCell(3, WIDTH), "gated memory cell (LSTM)"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_recurrent_modules_are_read_at_every_time_step(module, name):
    found = recurrent(module)
    assert len(by_step(found, 4)) == len(found) == 4
    assert all(record.name.startswith(name) for record in found)


def test_gates_are_those_of_their_own_step():
    first, second = recurrent(nn.GRU(3, WIDTH))[:2]
    assert first.skip != second.skip


def test_a_long_map_is_read_once():
    flow = stabkit.iterate(lambda x: x + 0.1 * torch.tanh(x), torch.ones(2, 3, dtype=torch.float64), 1000)
    found = identify(flow)
    assert len(found) == 1000
    assert {(record.name, record.step_size) for record in found} == {("forward Euler", 0.1)}


def test_gates_of_a_long_map_say_at_which_step_they_were_read():
    cell = nn.GRUCell(3, WIDTH)
    flow = stabkit.iterate(lambda x: cell(torch.zeros(len(x), 3), x), torch.ones(2, WIDTH), 200)
    found = identify(flow)
    read_elsewhere = [record for record in found if "as they are at step" in record.notes[0]]
    assert len(read_elsewhere) == 200 - 64


def test_a_state_of_two_tensors():
    def step(state):
        position, velocity = state
        velocity = velocity - 0.01 * torch.sin(position)
        return position + velocity, velocity

    start = (torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    found = identify(stabkit.iterate(step, start, 5))[0]
    assert found.name == "symplectic Euler (position, velocity)"
    assert found.step_size == pytest.approx(0.1)
