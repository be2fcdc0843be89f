"""Runge-Kutta tableaux whose stages have weights of their own, under a long skip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.integrators import GeneralLinearMethod, named


class _Block(nn.Module):
    def __init__(self, rows: list[list[float]], b: list[float]) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Sequential(nn.PReLU(), nn.Linear(4, 4)) for _ in b)
        self.rows, self.b = rows, b

    def forward(self, x: Tensor) -> Tensor:
        stages: list[Tensor] = []
        for field, row in zip(self.fields, self.rows, strict=True):
            argument = x
            for number, stage in zip(row, stages, strict=False):
                argument = argument + number * stage if number else argument
            stages.append(field(argument))
        change = sum((number * stage for number, stage in zip(self.b, stages, strict=True) if number), torch.zeros(()))
        return x + change


class _LongSkip(nn.Module):
    def __init__(self, rows: list[list[float]], b: list[float]) -> None:
        super().__init__()
        self.head, self.fuse, self.tail = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.body = nn.ModuleList(_Block(rows, b) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = x
        for block in self.body:
            y = block(y)
        return self.tail(x + self.fuse(y))


@pytest.mark.parametrize(("name", "order"), [("kutta3", 3), ("heun3", 3), ("heun2", 2), ("rk4", 4)])
def test_stages_with_weights_of_their_own(name: str, order: int) -> None:
    """Each block is a step by itself, with the numbers of a method, whose order is promised of one field alone."""
    method = named(name)
    assert isinstance(method, GeneralLinearMethod)
    torch.manual_seed(0)
    model = _LongSkip(method.A.tolist(), method.B[0].tolist()).double()
    found = stabkit.identify(stabkit.trace(model, torch.randn(3, 3).double()))
    for record in found[1:4]:
        assert record.name == f"{name} tableau, a field of its own at every stage"
        assert (record.evidence, record.shared_weights) == ("proven", False)
        assert f"of order {order} where the fields are one" in record.system


def test_other_numbers_are_no_method_of_the_catalogue() -> None:
    """A step of different fields one after the other, and one inside another, keep their names."""
    torch.manual_seed(0)
    x = torch.randn(3, 3)
    lie = stabkit.identify(stabkit.trace(_LongSkip([[0, 0], [1, 0]], [1, 1]), x))
    assert {record.name for record in lie[1:4]} == {"Lie splitting (2 Euler steps)"}
    inner = stabkit.identify(stabkit.trace(_LongSkip([[0, 0], [0.5, 0]], [0, 1]), x))
    assert not any("tableau" in record.name for record in inner)
