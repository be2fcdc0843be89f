"""Networks of several stages that share their weights: solvers written by hand and those of torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Built, Family, Step, constant, dense, stack

H = 0.3


class Field(nn.Module):
    """A right-hand side that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense(4)

    def forward(self, t: Any, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(torch.as_tensor(t, dtype=y.dtype))


class Solver(nn.Module):
    """Some steps of an explicit Runge-Kutta method."""

    def __init__(self, A: Sequence[Sequence[float]], b: Sequence[float], depth: int = 3) -> None:
        super().__init__()
        self.A, self.b, self.depth, self.field = A, b, depth, Field()

    def forward(self, y: Tensor) -> Tensor:
        t = 0.0
        for _ in range(self.depth):
            k = []
            for row in self.A:
                stage = y
                for a, slope in zip(row, k, strict=False):
                    if a:
                        stage = stage + H * a * slope
                k.append(self.field(t + H * sum(row), stage))
            for b, slope in zip(self.b, k, strict=True):
                y = y + H * b * slope
            t += H
        return y


class Library(nn.Module):
    """torchdiffeq over equal intervals."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.field, self.method = Field(), method

    def forward(self, x: Tensor) -> Tensor:
        import torchdiffeq

        return torchdiffeq.odeint(self.field, x, torch.linspace(0, 0.9, 4, dtype=x.dtype), method=self.method)[-1]


def solver(model: Callable[[], nn.Module]) -> Built:
    return model().double(), (torch.randn(2, 4, dtype=torch.float64),), {}


def whole(model: Callable[[], nn.Module]) -> Built:
    """The whole solve as one step."""
    return model().double(), (torch.randn(2, 4, dtype=torch.float64),), {"depth": [""]}


RK4 = [[], [0.5], [0, 0.5], [0, 0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]
KUTTA3 = [[], [0.5], [-1.0, 2.0]], [1 / 6, 2 / 3, 1 / 6]
THREE_EIGHTHS = [[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]
UNKNOWN = [[], [0.7]], [0.2, 0.8]


def polynomial(*coefficients: float) -> Callable[..., Any]:
    """R of the code's own field: the coefficients are those of powers of h z."""
    return constant(lambda z: sum(c * (H * z) ** k for k, c in enumerate(coefficients)))


def antisymmetric() -> nn.Module:
    """Chang et al. 2019: h' = h + eps tanh((W - W^T - gamma I) h)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        skew = m.W - m.W.T - 0.1 * torch.eye(6, dtype=x.dtype)
        return x + 0.05 * torch.tanh(x @ skew.T)

    return Step(forward, W=nn.Parameter(torch.randn(6, 6)))


def parabolic() -> nn.Module:
    """Ruthotto and Haber 2020: x' = x - h K^T phi(K x)."""
    return Step(lambda m, x: x - 0.1 * (torch.tanh(x @ m.K.T) @ m.K), K=nn.Parameter(torch.randn(6, 6)))


FAMILIES = (
    Family("RK-net, rk4", "rk4", partial(solver, lambda: Solver(*RK4)), polynomial(1, 1, 1 / 2, 1 / 6, 1 / 24)),
    Family("RK-net, Kutta 3", "kutta3", partial(solver, lambda: Solver(*KUTTA3)), polynomial(1, 1, 1 / 2, 1 / 6)),
    Family("RK-net, 3/8 rule", "three_eighths", partial(solver, lambda: Solver(*THREE_EIGHTHS)),
           polynomial(1, 1, 1 / 2, 1 / 6, 1 / 24)),
    Family("RK-net, no known tableau", "2-stage Runge-Kutta (c = 0.7, b = 0.2 and 0.8, order 1)",
           partial(solver, lambda: Solver(*UNKNOWN)), polynomial(1, 1, 0.56)),
    Family("torchdiffeq euler", "forward Euler", partial(solver, lambda: Library("euler")),
           polynomial(1, 1)),
    Family("torchdiffeq midpoint", "midpoint", partial(solver, lambda: Library("midpoint")), polynomial(1, 1, 1 / 2)),
    Family("torchdiffeq heun3", "heun3", partial(solver, lambda: Library("heun3")), polynomial(1, 1, 1 / 2, 1 / 6)),
    Family("torchdiffeq rk4", "three_eighths", partial(solver, lambda: Library("rk4")),
           polynomial(1, 1, 1 / 2, 1 / 6, 1 / 24)),
    Family("a whole solve as one step", "3 steps of rk4", partial(whole, lambda: Solver(*RK4)),
           constant(lambda z: sum((H * z) ** k / f for k, f in enumerate((1, 1, 2, 6, 24))) ** 3), which=0),
    Family("antisymmetric RNN layer", "forward Euler", stack(antisymmetric), constant(lambda z: 1 + 0.05 * z)),
    Family("parabolic network", "forward Euler", stack(parabolic), constant(lambda z: 1 + 0.1 * z)),
)  # fmt: skip
