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
