"""Steps of several additions one after the other, each with numbers of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification.record import Identification


class _Block(nn.Module):
    def __init__(self, rule: Callable[[_Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule, self.norm = rule, nn.LayerNorm(6)
        self.f, self.g, self.h = (
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in "fgh"
        )
        self.down, self.up, self.full = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor, held: Tensor) -> Tensor:
        return self.rule(self, x, held)


class _Stack(nn.Module):
    def __init__(self, rule: Callable[[_Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.blocks = nn.Linear(4, 6), nn.ModuleList(_Block(rule) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = held = torch.tanh(self.head(x))
        for block in self.blocks:
            x = block(x, held)
        return x


def _read(rule: Callable[[_Block, Tensor, Tensor], Tensor]) -> Identification:
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(_Stack(rule), torch.randn(3, 4)))
    return next(r for r in found if 3 in r.steps)


def _macaron(m: _Block, x: Tensor, held: Tensor) -> Tensor:
    x = x + 0.5 * m.f(x)
    x = x + m.g(x)
    return m.norm(x + 0.25 * m.h(x))


def _laurel(m: _Block, x: Tensor, held: Tensor) -> Tensor:
    x = 0.25 * m.f(x) + 0.75 * (x + m.up(m.down(x)))
    return 0.5 * m.g(x) + 0.5 * (x + m.full(x))


def _anchored(m: _Block, x: Tensor, held: Tensor) -> Tensor:
    x = 0.9 * x + 0.2 * held
    x = x + m.f(x)
    return x + m.g(x)


def _anchored_from_outside(m: _Block, x: Tensor, held: Tensor) -> Tensor:
    x = torch.lerp(x, held, 0.125)
    return 0.5 * x + 0.5 * m.f(x)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (_macaron, "Lie splitting (3 Euler steps, h = 0.5, 1, 0.25), then a norm (post-norm)"),
        (
            _laurel,
            "Lie splitting (damped Euler (a = 0.75) with a low-rank linear term, damped Euler (a = 0.5) with a linear "
            "term)",
        ),
        (_anchored, "Lie splitting (restart from a held state x_0 (0.9 x + 0.2 x_0), 2 Euler steps)"),
        (
            _anchored_from_outside,
            "Lie splitting (restart from a held state x_0 (0.875 x + 0.125 x_0), damped Euler (a = 0.5))",
        ),
    ],
)
def test_every_addition_has_its_numbers(rule: Callable[[_Block, Tensor, Tensor], Tensor], name: str) -> None:
    """Neither the last step size nor the product of all skips stands for steps of several sizes."""
    found = _read(rule)
    assert (found.name, found.evidence) == (name, "proven")


def test_a_norm_behind_every_addition_is_told_as_before() -> None:
    """A post-norm layer of two additions is projected twice."""
    found = _read(lambda m, x, held: m.norm(m.norm(x + m.f(x)) + m.g(x)))
    assert "then a norm" not in found.name
    twice = _read(lambda m, x, held: m.norm((y := m.norm(x + m.f(x))) + m.g(y)))
    assert (twice.name, twice.step_size) == ("projected Euler (post-norm)", 1.0)
