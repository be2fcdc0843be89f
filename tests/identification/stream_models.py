"""Networks of several states over depth: multistep, momentum, reversible, Hamiltonian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Built, Family, Step, constant, dense, stack

DEPTH = 6


class Loop(nn.Module):
    """Layers in a loop that is given."""

    def __init__(self, loop: Callable[..., Tensor], make: Callable[[], nn.Module], count: int = DEPTH) -> None:
        super().__init__()
        self.fields = nn.ModuleList(make() for _ in range(count))
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self.fields, x)


def looped(
    loop: Callable[..., Tensor], make: Callable[[], nn.Module] = dense, width: int = 6, count: int = DEPTH
) -> Built:
    return Loop(loop, make, count).double(), (torch.randn(2, width, dtype=torch.float64),), {}


def linear_multistep(fields: Any, x: Tensor) -> Tensor:
    """Lu et al. 2018."""
    before, now = x, x + fields[0](x)
    for f in fields[1:]:
        before, now = now, 1.2 * now - 0.2 * before + f(now)
    return now


def midpoint(fields: Any, x: Tensor) -> Tensor:
    """Chang et al. 2018, two-step midpoint."""
    before, now = x, x + 0.1 * fields[0](x)
    for f in fields[1:]:
        before, now = now, before + 0.2 * f(now)
    return now


def leapfrog(fields: Any, x: Tensor) -> Tensor:
    """Haber and Ruthotto 2017: y'' = f(y)."""
    before, now = x, x + 0.1 * fields[0](x)
    for f in fields[1:]:
        before, now = now, 2 * now - before + 0.04 * f(now)
    return now


def adams(fields: Any, x: Tensor) -> Tensor:
    """Two-step Adams-Bashforth."""
    slope = fields[0](x)
    x = x + 0.1 * slope
    for _ in range(DEPTH):
        new = fields[0](x)
        x = x + 0.1 * (1.5 * new - 0.5 * slope)
        slope = new
    return x


def momentum(fields: Any, x: Tensor) -> Tensor:
    """Sander et al. 2021."""
    v = torch.zeros_like(x)
    for f in fields:
        v = 0.9 * v + 0.1 * f(x)
        x = x + v
    return x


def second_order(fields: Any, x: Tensor) -> Tensor:
    """Position and velocity without friction."""
    v = torch.zeros_like(x)
    for f in fields:
        v = v + 0.2 * f(x)
        x = x + 0.2 * v
    return x


def reversible(fields: Any, x: Tensor) -> Tensor:
    """Gomez et al. 2017, in a plain loop."""
    a, b = x.chunk(2, dim=1)
    for f, g in zip(fields[::2], fields[1::2], strict=True):
        a = a + f(b)
        b = b + g(a)
    return torch.cat([a, b], dim=1)


class Gradient(nn.Module):
    """-K^T tanh(K x): the force of a potential."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.K = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return -(torch.tanh(x @ self.K.T) @ self.K)


def hamiltonian(fields: Any, x: Tensor) -> Tensor:
    """Chang et al. 2018: z -= h K^T tanh(K y), y += h K^T tanh(K z)."""
    y, z = x.chunk(2, dim=1)
    for f, g in zip(fields[::2], fields[1::2], strict=True):
        z = z + 0.1 * f(y)
        y = y - 0.1 * g(z)
    return torch.cat([y, z], dim=1)


class Coupling(nn.Module):
    """A reversible block that takes and returns one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = dense(3), dense(3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, 3, dim=1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], dim=1)


def pair_block() -> nn.Module:
    """A reversible block that takes and returns a pair."""

    def forward(m: Any, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = state
        a = a + m.parts[0](b)
        return a, b + m.parts[1](a)

    return Step(forward, dense(3), dense(3))


class Pairs(nn.Module):
    """Reversible blocks that pass a pair along."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(pair_block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.blocks((x[:, :3], x[:, 3:])), dim=1)


def pairs() -> Built:
    return Pairs().double(), (torch.randn(2, 6, dtype=torch.float64),), {}


def coupling(a: complex, b: complex) -> list[list[complex]]:
    return [[1, a], [b, 1 + a * b]]


REVERSIBLE = "reversible (two-stream symplectic Euler)"
FAMILIES = (
    Family("LM-ResNet", "two-step (LM-ResNet, k = -0.2)", partial(looped, linear_multistep),
           constant(lambda z: [[0, 1], [-0.2, 1.2 + z]]), which=2),
    Family("midpoint net", "leapfrog", partial(looped, midpoint),
           constant(lambda z: [[0, 1], [1, 0.2 * z]]), which=2),
    Family("leapfrog net", "second_order_leapfrog", partial(looped, leapfrog),
           lambda flow, record: lambda w: [[0, 1], [-1, 2 + 0.2 * w]], which=2),
    Family("Adams-Bashforth net", "ab2", partial(looped, adams, count=1),
           constant(lambda z: [[1 + 0.15 * z, -0.05], [z, 0]]), which=2),
    Family("Momentum ResNet", "momentum (gamma = 0.9)", partial(looped, momentum),
           constant(lambda z: [[1 + 0.1 * z, 0.9], [0.1 * z, 0.9]]), which=2),
    Family("second-order net", "symplectic Euler (position, velocity)", partial(looped, second_order),
           lambda flow, record: lambda w: [[1 + 0.2 * w, 0.2], [w, 1]], which=2),
    Family("RevNet, a loop", REVERSIBLE, partial(looped, reversible, partial(dense, 3)), constant(coupling)),
    Family("RevNet, pairs", REVERSIBLE, pairs, constant(coupling)),
    Family("RevNet, one tensor", REVERSIBLE, stack(Coupling), constant(coupling)),
    Family("Hamiltonian net", "symplectic Euler (Hamiltonian)", partial(looped, hamiltonian, Gradient),
           lambda flow, record: lambda a, b: coupling(0.1 * a, 0.1 * b)),
)  # fmt: skip
