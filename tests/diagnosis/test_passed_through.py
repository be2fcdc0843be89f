"""Couplings that never take turns: what they all keep is told, and those that do take turns raise nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis.finding import serious

ANGLES = math.pi * torch.rand(128, generator=torch.Generator().manual_seed(0))
MOONS = 3 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1) + 0.1 * torch.randn(
    128, 2, generator=torch.Generator().manual_seed(1)
)


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width))


class Masked(nn.Module):
    """Real NVP with a mask, as many write it."""

    def __init__(self, mask: list[float], zero: bool = False):
        super().__init__()
        self.register_buffer("mask", torch.tensor(mask))
        self.s, self.t = net(len(mask)), net(len(mask))
        if zero:
            for made in (self.s, self.t):
                nn.init.zeros_(made[-1].weight)
                nn.init.zeros_(made[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x * self.mask
        s, t = (torch.tanh(self.s(kept)) * (1 - self.mask), self.t(kept) * (1 - self.mask))
        return kept + (1 - self.mask) * (x * s.exp() + t), s.sum(1)


class Halves(nn.Module):
    """Real NVP with a split."""

    def __init__(self, swap: bool = False):
        super().__init__()
        self.net, self.swap = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 2)), swap

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        b = b * torch.tanh(s).exp() + t
        return torch.cat([b, a] if self.swap else [a, b], 1), torch.tanh(s).sum(1)


class Chain(nn.Module):
    def __init__(self, layers: list[nn.Module], flip: bool = False):
        super().__init__()
        self.layers, self.flip = nn.ModuleList(layers), flip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, ld = layer(x)
            x, total = x.flip(1) if self.flip else x, total + ld
        return x, total


def likelihood(output: tuple[Tensor, Tensor]) -> Tensor:
    z, logdet = output
    return (0.5 * z.square().sum(1) + math.log(2 * math.pi) - logdet).mean()


def alarms(model: nn.Module) -> list[stabkit.diagnosis.Finding]:
    report = stabkit.analyze(model, MOONS, loss=likelihood, spectrum="none")
    return [f for f in report.findings if serious(f)]


FIRST, SECOND = [1.0, 0.0], [0.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain([Masked(FIRST) for _ in range(4)]),
        lambda: Chain([Masked(FIRST, zero=True) for _ in range(4)]),
        lambda: Chain([Halves() for _ in range(3)]),
    ],
    ids=["mask", "from the identity", "halves"],
)
def test_couplings_that_all_keep_the_same_entries_are_told_with_turns_that_were_tried(make):
    torch.manual_seed(0)
    (found,) = alarms(make())
    assert (found.kind, found.module_path) == ("no_gradient", "layers.0")
    assert "all leave the same 1 of 2 entries of a sample as they are" in found.evidence
    assert "give every second one the opposite mask" in found.remedy


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain([Masked(m) for m in (FIRST, SECOND, FIRST, SECOND)]),
        lambda: Chain([Masked(FIRST) for _ in range(4)], flip=True),
        lambda: Chain([Halves(swap=True) for _ in range(4)]),
        lambda: Chain([Masked(FIRST)]),
    ],
    ids=["two masks", "flips", "swaps", "one layer"],
)
def test_couplings_that_take_turns_are_silent(make):
    torch.manual_seed(0)
    assert alarms(make()) == []
