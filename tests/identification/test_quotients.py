"""Semi-implicit steps with a leak, by whatever quotient they are written, and their repetition in a cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

WIDTH, H = 6, 0.3


class _Leaking(nn.Module):
    """(x + h f(x)) / (1 + h w(x)); ``how`` says how it is written, or what it is instead."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.f = nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))
        self.w = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        y = x + H * self.f(x)
        if self.how == "quotient":
            return y / (1 + H * self.w(x))
        if self.how == "reciprocal":
            return y * (1 + H * self.w(x)).reciprocal()
        if self.how == "norm":
            return y / (1e-6 + y.norm(dim=-1, keepdim=True))
        if self.how == "bend":
            return y / (1 + y.abs())
        return y * torch.sigmoid(self.w(x))


def _names(how: str) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(_Leaking(how) for _ in range(3)))
    return [r.name for r in stabkit.identify(stabkit.trace(model, torch.randn(2, WIDTH)), checks=False)]


@pytest.mark.parametrize("how", ["quotient", "reciprocal"])
def test_a_quotient_by_one_and_a_leak_is_semi_implicit(how: str) -> None:
    assert all(name.startswith("semi-implicit Euler (mean a = 0.") for name in _names(how))


@pytest.mark.parametrize("how", ["norm", "bend", "gate"])
def test_other_quotients_and_gates_are_not(how: str) -> None:
    assert not any("implicit" in name for name in _names(how))


class _Cell(nn.Module):
    """A liquid cell of several unfolds a time."""

    def __init__(self, unfolds: int) -> None:
        super().__init__()
        self.unfolds = unfolds
        self.drive, self.gate, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, 4), nn.Linear(4, WIDTH)
        self.rest = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        v, out = x.new_zeros(len(x), 4), []
        for u in self.drive(x).unbind(1):
            for _ in range(self.unfolds):
                f = torch.sigmoid(self.gate(v) + u)
                v = (v + H * f * self.rest) / (1 + H * (0.5 + f))
            out.append(v)
        return x + self.out(torch.stack(out, 1))


@pytest.mark.parametrize(
    ("unfolds", "name"), [(1, "semi-implicit Euler (mean a"), (4, "4 substeps of semi-implicit Euler (mean a")]
)
def test_unfolds_of_a_cell_are_substeps(unfolds: int, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(_Cell(unfolds) for _ in range(2)))
    found = stabkit.identify(stabkit.trace(model, torch.randn(2, 8, WIDTH)), checks=False)
    times = [time for record in found for time in record.over_time]
    assert len(times) == 2
    assert all(time.name.startswith(name) and time.evidence == "measured" for time in times)


class _Gated(nn.Module):
    """One gated step, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.sigmoid(self.gate(x)) * (torch.tanh(self.f(x)) - x)
        return x


def test_one_gate_that_is_repeated_makes_substeps_and_no_splitting() -> None:
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(_Gated(), _Gated()), torch.randn(2, WIDTH), depth=["0", "1"])
    assert all(r.name.startswith("3 gated substeps (mean a = ") for r in stabkit.identify(flow, checks=False))
