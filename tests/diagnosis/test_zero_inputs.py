"""Zeros that a recurrence begins with are told for what they are, and are no mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import serious


class Recurrent(nn.Module):
    """A recurrent module and a head on its last output."""

    def __init__(self, kind: Callable[..., nn.Module], given: bool = False, afresh: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.given, self.afresh = kind(6, 24, batch_first=True), nn.Linear(24, 3), given, afresh

    def forward(self, x: Tensor) -> Tensor:
        if self.afresh:  # a state that is never carried on
            return self.head(torch.cat([self.rnn(x[:, t : t + 1])[0] for t in range(x.shape[1])], 1).mean(1))
        start = x.new_zeros(1, x.shape[0], 24)
        return self.head(
            self.rnn(x, (start, torch.zeros_like(start)))[0][:, -1] if self.given else self.rnn(x)[0][:, -1]
        )


class Cell(nn.Module):
    """A loop of a cell from zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.LSTMCell(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 24)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


def found(model: nn.Module, length: int) -> list[stabkit.Finding]:
    x = torch.randn(24, length, 6, generator=torch.Generator().manual_seed(1))
    y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))

    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out, y)

    return stabkit.diagnose(stabkit.trace(model, x).following(loss), loss)


@pytest.mark.parametrize(
    ("model", "length"),
    [
        (Recurrent(nn.LSTM), 1),
        (Recurrent(nn.GRU), 1),
        (Recurrent(nn.LSTM, given=True), 1),
        (Recurrent(nn.LSTM, afresh=True), 5),
        (Cell(), 1),
    ],
)
def test_recurrent_weights_that_meet_the_first_state_alone_are_a_fact_and_no_mask(model, length):
    (fact,) = found(model, length)
    assert (fact.kind, fact.severity) == ("no_gradient", "info")
    assert "weight_hh" in fact.evidence
    assert "constants of zeros, as the state that a recurrence begins with" in fact.evidence
    assert "mask" not in fact.evidence + fact.remedy


@pytest.mark.parametrize("model", [Recurrent(nn.LSTM), Recurrent(nn.GRU), Cell()])
def test_more_steps_raise_nothing(model):
    assert not found(model, 5)


def test_a_product_with_a_constant_of_zeros_is_called_what_it_is():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.gate, self.head = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 3)
            self.register_buffer("offset", torch.zeros(24))

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, 0]
            return self.head(torch.tanh(self.a(x) + torch.sigmoid(self.gate(x)) * self.offset))

    (closed,) = found(Gated(), 1)
    assert serious(closed)
    assert "gate.weight, gate.bias" in closed.evidence
    assert "a constant of 24 zeros" in closed.evidence
    assert "mask" not in closed.evidence + closed.remedy
