"""Products with increments that are given are a diffusion beside the method of the drift; entries that a mask holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

WIDTH, H = 6, 0.1
GIVEN = ", and products with increments that are given"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))


class Solver(nn.Module):
    """Rounds of a stochastic equation with increments of a Brownian motion that are drawn beforehand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.f, self.g = how, net(), net()
        self.gain = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor, dw: Tensor) -> Tensor:
        return getattr(self, self.how)(x, dw)

    def reversible_heun(self, y: Tensor, dw: Tensor) -> Tensor:
        z, f, g = y, self.f(y), self.g(y)
        for d in dw:
            z = 2 * y - z + H * f + g * d
            f_new, g_new = self.f(z), self.g(z)
            y, f, g = y + H / 2 * (f + f_new) + (g + g_new) * d / 2, f_new, g_new
        return y

    def adams(self, x: Tensor, dw: Tensor) -> Tensor:
        old = self.f(x)
        for d in dw:
            f = self.f(x)
            x, old = x + H * (1.5 * f - 0.5 * old) + self.g(x) * d, f
        return x

    def kinetic(self, x: Tensor, dw: Tensor) -> Tensor:
        v = 0.1 * x
        for d in dw:
            v = v - H * self.f(x) + self.g(x) * d
            x = x + H * v
        return x

    def learned(self, x: Tensor, dw: Tensor) -> Tensor:
        v = 0.1 * x
        for _ in dw:
            v = v - H * self.f(x) + self.gain * self.g(x)
            x = x + H * v
        return x


def read(how: str) -> list[stabkit.identification.Identification]:
    torch.manual_seed(0)
    flow = stabkit.trace(Solver(how), torch.randn(4, WIDTH), 0.3 * torch.randn(6, 4, WIDTH), source="0")
    return list(stabkit.identify(flow, checks=False))[2:-2]


@pytest.mark.parametrize(
    ("how", "name"),
    [("reversible_heun", "reversible Heun"), ("adams", "ab2"), ("kinetic", "symplectic Euler (position, velocity)")],
)
def test_the_drift_is_named_beside_increments_that_are_given(how: str, name: str):
    found = read(how)
    assert found
    assert {r.name for r in found} == {name + GIVEN}
    assert all(r.step_size == pytest.approx(H) and r.evidence == "measured" for r in found)


def test_learned_numbers_of_both_signs_are_no_increments():
    assert not any(GIVEN in r.name for r in read("learned"))


class Held(nn.Module):
    """Particles of which a mask holds some."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.f = how, net()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.how == "positions":
            old = x
            for _ in range(6):
                x, old = torch.where(mask, 2 * x - old + 0.04 * self.f(x), x), x
            return x
        v = 0.1 * x
        for _ in range(6):
            v_new = v + 0.2 * self.f(x)
            v, x = torch.where(mask, v_new, v), torch.where(mask, x + 0.2 * v_new, x)
        return x


@pytest.mark.parametrize(
    ("how", "name", "told"),
    [
        ("positions", "second_order_leapfrog", "a mask keeps 25% of the rows of the state as they are"),
        ("velocities", "symplectic Euler (position, velocity)", "a mask holds some entries"),
    ],
)
def test_a_step_of_some_entries_is_that_of_the_entries_that_move(how: str, name: str, told: str):
    torch.manual_seed(0)
    mask = torch.tensor([[True], [True], [False], [True]])
    found = list(stabkit.identify(stabkit.trace(Held(how), torch.randn(4, WIDTH), mask)))[2:-1]
    assert {r.name for r in found} == {name}
    assert all(r.step_size == pytest.approx(0.2) and r.evidence == "measured" for r in found)
    assert any(told in note for r in found for note in r.notes)
