"""What is called a memory cell meets its equations; masks that keep rows as they are give no numbers of the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit

WIDTH = 8
Cell = Callable[..., tuple[Tensor, ...]]


class OverTime(nn.Module):
    """A loop over time around a cell; a mask, where there is one, lets the state of some samples be."""

    def __init__(self, cell: nn.Module, states: int, masked: str = "") -> None:
        super().__init__()
        self.cell, self.states, self.masked = cell, states, masked
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        state = tuple(x.new_zeros(len(x), WIDTH) for _ in range(self.states))
        for t in range(x.shape[1]):
            new = self.cell(x[:, t], state if self.states > 1 else state[0])
            new = new if self.states > 1 else (new,)
            kept = (t < lengths)[:, None]
            if self.masked == "where":
                new = tuple(torch.where(kept, n, o) for n, o in zip(new, state, strict=True))
            if self.masked == "product":
                new = tuple(n * kept.to(n) + o * (1 - kept.to(n)) for n, o in zip(new, state, strict=True))
            state = new
        return self.out(state[0])


class GatedAndMemory(nn.Module):
    """A gated state that drives a linear memory (HiPPO, Gu et al. 2020): no output gate, no readout of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.v = nn.Linear(4 + 2 * WIDTH, WIDTH), nn.Linear(4 + 2 * WIDTH, WIDTH)
        self.f = nn.Linear(WIDTH, 1)
        self.register_buffer("A", torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))
        self.register_buffer("B", torch.randn(WIDTH))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, m = state
        both = torch.cat([x, h, m], 1)
        z = torch.sigmoid(self.z(both))
        h = (1 - z) * h + z * torch.tanh(self.v(both))
        return h, m @ self.A.T + self.f(h) * self.B


class Peephole(nn.Module):
    """An LSTM whose gates see the cell, with coupled gates or not."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.coupled, self.gates = coupled, nn.Linear(4 + WIDTH, 4 * WIDTH)
        self.p = nn.Parameter(0.3 * torch.randn(2, WIDTH))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        f = torch.sigmoid(f + self.p[0] * c)
        c = f * c + (1 - f if self.coupled else torch.sigmoid(i)) * torch.tanh(g)
        return torch.sigmoid(o + self.p[1] * c) * torch.tanh(c), c


def read(cell: nn.Module, states: int, masked: str = "") -> tuple[stabkit.identification.Identification, ...]:
    torch.manual_seed(0)
    lengths = torch.tensor([9, 6, 9, 5])
    return stabkit.identify(stabkit.trace(OverTime(cell, states, masked), torch.randn(4, 9, 4), lengths))


@pytest.mark.parametrize("make", [lambda: nn.LSTMCell(4, WIDTH), lambda: Peephole(False), lambda: Peephole(True)])
def test_memory_cells_that_meet_their_equations(make):
    torch.manual_seed(0)
    assert {r.name for r in read(make(), 2)[:-1]} == {"gated memory cell (LSTM)"}


def test_a_gated_state_beside_a_linear_memory_is_no_lstm():
    torch.manual_seed(0)
    assert not [r.name for r in read(GatedAndMemory(), 2) if "LSTM" in r.name]


def test_how_much_of_the_old_state_is_kept_is_told_of_that_number_alone():
    """The range of the forget gate, and not that of all gates: the output gate is open here."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(4, WIDTH)
    cell.bias_ih.data[3 * WIDTH :] = 5.0
    found = read(cell, 2)[3]
    seen = []  # by a run of its own: what a hook writes down in a trace is put back
    handle = cell.register_forward_hook(lambda module, args, out: seen.append(args))
    torch.manual_seed(0)
    OverTime(cell, 2, "")(torch.randn(4, 9, 4), torch.tensor([9, 6, 9, 5]))
    handle.remove()
    x, (h, _) = seen[3]
    gates = x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
    f = torch.sigmoid(gates.chunk(4, 1)[1])
    assert f"is multiplied by {f.min():.3g} to {f.max():.3g} in the new one" in " ".join(found.notes)


@pytest.mark.parametrize("masked", ["where", "product"])
@pytest.mark.parametrize(
    ("make", "states", "name"),
    [
        (lambda: nn.GRUCell(4, WIDTH), 1, "gated Euler"),
        (lambda: nn.RNNCell(4, WIDTH), 1, "plain"),
        (lambda: nn.LSTMCell(4, WIDTH), 2, "gated memory cell"),
    ],
)
def test_the_step_is_that_of_the_rows_that_a_mask_lets_pass(make, states, name, masked):
    torch.manual_seed(0)
    found = [r for r in read(make(), states, masked) if r.steps[0] == 7]
    assert [r.name.startswith(name) for r in found] == [True]
    assert found[0].evidence == "measured"
    if name == "gated Euler":
        assert found[0].skip == pytest.approx(1 - found[0].step_size)
        assert 0.3 < found[0].skip < 0.7
