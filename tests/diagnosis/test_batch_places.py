"""Outputs that depend on the place of a sample in its batch are told with where that begins; others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Finding
from stabkit.diagnosis.states.batch_places import batch_place_findings


class Placed(nn.Module):
    """A state for every position, with something of a table added."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], learnt: bool = False, count: int = 50) -> None:
        super().__init__()
        torch.manual_seed(0)
        table = torch.randn(count, 1, 8)
        self.add, self.table = add, nn.Parameter(table) if learnt else nn.Buffer(table)
        self.first, self.mix, self.head = nn.Linear(4, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.add(self.first(x), self.table))[0][:, -1])


def wrong(x: Tensor, table: Tensor) -> Tensor:
    return x + table[: x.size(0)]


def into(x: Tensor, table: Tensor) -> Tensor:
    return torch.cat([x[:, :1] + table[: len(x)].transpose(0, 1)[0][:, None], x[:, 1:]], 1)


def right(x: Tensor, table: Tensor) -> Tensor:
    return x + table[: x.size(1), 0]


def drawn(x: Tensor, _table: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def centred(x: Tensor, _table: Tensor) -> Tensor:
    return x - x.mean(0)


class Towers(nn.Module):
    """Vectors of two inputs beside each other; positions may be counted along the samples."""

    def __init__(self, out: Callable[[Tensor, Tensor], object], placed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out, self.table = out, nn.Buffer(torch.randn(50, 1, 8) * placed)
        self.one, self.other = nn.Linear(4, 8), nn.Linear(3, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor, z: Tensor) -> object:
        return self.out(self.mix(self.one(x) + self.table[: len(x)])[0][:, -1], self.other(z))


def similar(u: Tensor, v: Tensor) -> Tensor:
    return u @ v.T


def others(u: Tensor, v: Tensor) -> Tensor:
    """The similarity to the partner, and those to all others behind it."""
    own = torch.eye(len(u), dtype=torch.bool)
    return torch.cat([(u @ v.T)[own][:, None], (u @ v.T)[~own].reshape(len(u), -1)], 1)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "matrix": similar,
    "both ways": lambda u, v: {"one": u @ v.T, "other": v @ u.T, "own": (u * v).sum(1)},
    "products": lambda u, v: u[:, None] * v[None],
    "in one axis": lambda u, v: (u @ v.T).flatten(),
    "diagonal masked": lambda u, v: (u @ v.T).masked_fill(torch.eye(len(u), dtype=torch.bool), -9e9),
    "partner first": others,
    "beside each other": lambda u, v: torch.cat([u @ v.T, u @ u.T], 1),
    "each pair once": lambda u, v: (u @ v.T).triu(1),
    "another's vector": lambda u, v: (u * v.flip(0)).sum(1),
}


def said_of_towers(model: nn.Module) -> list[Finding]:
    draw = torch.Generator().manual_seed(1)
    given = (torch.randn(12, 6, 4, generator=draw), torch.randn(12, 3, generator=draw))
    return batch_place_findings(stabkit.trace(model, *given, check=False))


@pytest.mark.parametrize("name", OUTPUTS)
def test_samples_held_against_all_of_another_input(name: str) -> None:
    assert said_of_towers(Towers(OUTPUTS[name])) == []


@pytest.mark.parametrize("name", ["matrix", "both ways", "products", "partner first"])
def test_positions_along_the_samples_beneath_a_matrix_of_them(name: str) -> None:
    (found,) = said_of_towers(Towers(OUTPUTS[name], placed=True))
    assert (found.kind, found.severity) == ("mixed_samples", "warning")
    assert "it begins at add (test_batch_places.py:" in found.evidence


def said(model: nn.Module) -> list[Finding]:
    x = torch.randn(12, 6, 4, generator=torch.Generator().manual_seed(1))
    return batch_place_findings(stabkit.trace(model, x, check=False))


@pytest.mark.parametrize("model", [Placed(wrong), Placed(wrong, learnt=True), Placed(into)])
def test_positions_along_the_axis_of_samples(model: nn.Module) -> None:
    (found,) = said(model)
    assert (found.kind, found.severity) == ("mixed_samples", "warning")
    assert "it begins at add (test_batch_places.py:" in found.evidence
    assert "x.size(1) and not to x.size(0)" in found.remedy


@pytest.mark.parametrize("model", [Placed(right), Placed(drawn), Placed(centred), Placed(wrong, learnt=True, count=12)])
def test_positions_draws_statistics_and_codes_of_samples(model: nn.Module) -> None:
    assert said(model) == []


@pytest.mark.parametrize("bad", [True, False])
def test_a_model_that_mixes_samples_in_training_alone(bad: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.norm, self.outer = nn.Linear(4, 8), nn.BatchNorm1d(6), nn.Linear(8, 2)
            self.positions = nn.Parameter(torch.randn(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.inner(x))
            placed = self.positions[: len(h), None] if bad else self.positions[: h.shape[1]]
            return self.outer(torch.relu(h + placed)).mean(1)

    assert [f.kind for f in said(Normed())] == ["mixed_samples"] * bad


def test_lengths_that_the_model_holds_by_itself_are_no_table_of_positions():
    lengths = torch.randint(3, 9, (24,), generator=torch.Generator().manual_seed(0))

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gru, self.head = nn.GRU(6, 12, batch_first=True), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.gru(packed)[1][-1])

    x = torch.randn(24, 8, 6, generator=torch.Generator().manual_seed(1))
    report = stabkit.analyze(Packed(), x, loss=lambda out: out.square().mean(), spectrum="none")
    (found,) = [f for f in report.findings if f.kind == "mixed_samples"]
    assert "give the model as an input what differs there" in found.remedy
