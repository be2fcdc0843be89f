"""Steps by their values, where something is detached in them: states, and events by a threshold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import Identification, identify
from stabkit.tracing.maps.scan_flow import over_scan, scans_of
from tests.diagnosis.test_rounds_of_time import Spike

WIDTH, ROUNDS = 6, 9


class Leaky(nn.Module):
    """Two layers of neurons that leak, and are reset by what they have reached (snnTorch)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.between = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, kept = x.new_zeros(len(x), WIDTH), x.new_zeros(len(x), 5), []
        for _ in range(ROUNDS):
            a = 0.9 * a + self.into(x) - Spike.apply(a - 1).detach()
            b = 0.9 * b + self.between(Spike.apply(a - 1)) - Spike.apply(b - 1).detach()
            kept.append(b)
        return torch.stack(kept)


class Round(nn.Module):
    """A hidden state with gates, first along rows and then along columns, which moves a coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.move = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.halves = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(2))

    def forward(self, h: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.relu(self.seen(place))
        for half in self.halves:
            z, q = half(torch.cat([h, seen], 1)).chunk(2, 1)
            z = torch.sigmoid(z)
            h = (1 - z) * h + z * torch.tanh(q)
        return h, self.move(h)


class Refined(nn.Module):
    """Rounds in which the coordinate is detached (Teed and Deng 2020)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.round = how, nn.Linear(4, WIDTH), Round()

    def forward(self, x: Tensor) -> Tensor:
        h, place, kept = torch.tanh(self.first(x)), x.new_zeros(len(x), 2), []
        for _ in range(ROUNDS):
            place = {"data": lambda t: t.data, "function": torch.detach, "method": Tensor.detach}[self.how](place)
            h, moved = self.round(h, place)
            place = place + moved
            kept.append(place)
        return torch.stack(kept)


def read(model: nn.Module) -> list[Identification]:
    torch.manual_seed(0)
    return [r for r in identify(stabkit.trace(model, 2 * torch.rand(3, 4)), checks=False) if r.name != "fork"]


def test_a_reset_that_is_detached_is_told_by_values_and_the_current_with_its_weight():
    torch.manual_seed(0)
    for record in read(Leaky())[2:-1]:
        assert record.notes[0].startswith("by values 2 states: damped Euler (a = 0.9), damped Euler (a = 0.9), proven")
        assert "(what is detached lies inside the step)" in record.notes[0]
        assert "x_1 (3x6): running sum (a = 0.9), driven by an input with the weight 1" in record.system
        assert record.evidence == "measured"


@pytest.mark.parametrize("how", ["method", "function", "data"])
def test_a_state_that_is_detached_in_every_round_is_told_by_values(how):
    torch.manual_seed(0)
    records = read(Refined(how))[2:-2]
    assert len(records) >= 4
    for record in records:
        assert record.name.startswith("Lie splitting (2 gated steps")
        assert (record.step_size, record.shared_weights) == (None, False)
        assert "T_i(x) (f_i(x) - x), one after the other" in record.system
        assert record.notes[0].startswith("by values 2 coupled states: Lie splitting (2 gated steps")
        assert "(3x2: a state that carries no gradient)" in record.notes[0]


def test_nothing_is_said_of_values_where_they_are_read_alike():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x) / layer(x).detach().norm())
            return x

    torch.manual_seed(0)
    records = read(Scaled())
    assert [r.name for r in records] == ["forward Euler"] * 4
    assert not any("by values" in note for r in records for note in r.notes)


def test_what_runs_on_nothing_but_what_is_detached_is_said_not_to_be_read():
    class Descends(nn.Module):
        """The graph of an energy is gone once its gradient is taken, and its number alone is used further."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                y = x.detach().requires_grad_()
                energy = torch.tanh(layer(y)).pow(2).sum(-1, keepdim=True)
                (slope,) = torch.autograd.grad(energy.sum(), y)
                x = x + torch.tanh(layer(x)) - 0.1 * slope - 0.1 * energy.detach()
            return x

    torch.manual_seed(0)
    records = read(Descends())
    assert [r.name for r in records] == ["forward Euler"] * 4
    assert all("by its values the step was not read" in r.notes[-1] for r in records)


def test_no_second_trace_is_made_to_save_memory_or_of_a_part_of_a_flow():
    torch.manual_seed(0)
    flow = stabkit.trace(Leaky(), 2 * torch.rand(3, 4), memory="recompute")
    assert not any("by values" in note for r in identify(flow, checks=False) for note in r.notes)
    whole = stabkit.trace(nn.GRU(4, WIDTH, batch_first=True), torch.randn(3, 9, 4), depth=[""])
    (scan,) = scans_of(whole, 0, len(whole.steps), in_layers=True)
    assert whole.by_values() is not None
    assert over_scan(whole, scan).by_values() is None
