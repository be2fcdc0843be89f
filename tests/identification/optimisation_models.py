"""Iterations of optimisation as networks, in the idiom of their repositories: no module tells where a round ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

MEASURED, WIDTH = 10, 16


def shrink(x: Tensor, t: Tensor | float) -> Tensor:
    """The soft threshold as LISTA's code writes it."""
    return torch.sign(x) * torch.maximum(torch.abs(x) - t, torch.zeros_like(x))


def network(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, outputs))


class LeastSquares(nn.Module):
    """What all have in common: the matrix A of y = A x, and the gradient of |A x - y|^2 / 2."""

    def __init__(self, rounds: int = 6) -> None:
        super().__init__()
        A = torch.randn(MEASURED, WIDTH) / MEASURED**0.5
        self.register_buffer("A", A)
        self.L, self.rounds = float(torch.linalg.matrix_norm(A, 2)) ** 2, rounds
        self.theta = nn.Parameter(torch.full((rounds,), 0.05))

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ self.A.T - y) @ self.A


class ISTA(LeastSquares):
    def forward(self, y: Tensor) -> Tensor:
        x = y @ self.A
        for k in range(self.rounds):
            x = shrink(x - self.gradient(x, y) / self.L, self.theta[k])
        return x


class ClampedISTA(LeastSquares):
    """The soft threshold written as x - clamp(x, -t, t)."""

    def forward(self, y: Tensor) -> Tensor:
        x = y @ self.A
        for _ in range(self.rounds):
            v = x - self.gradient(x, y) / self.L
            x = v - torch.clamp(v, -0.05, 0.05)
        return x


class LISTA(LeastSquares):
    """Gregor and LeCun 2010: one matrix S in all rounds, the first of which begins at zero."""

    def __init__(self, rounds: int = 6) -> None:
        super().__init__(rounds)
        self.S = nn.Linear(WIDTH, WIDTH, bias=False)
        self.S.weight.data = torch.eye(WIDTH) - self.A.T @ self.A / self.L

    def forward(self, y: Tensor) -> Tensor:
        b = y @ self.A / self.L
        z = shrink(b, self.theta[0])
        for k in range(1, self.rounds):
            z = shrink(b + self.S(z), self.theta[k])
        return z


class FISTA(LeastSquares):
    """Beck and Teboulle 2009: the momentum grows from 0 with the rounds."""

    def forward(self, y: Tensor) -> Tensor:
        x = z = y @ self.A
        t = 1.0
        for k in range(self.rounds):
            new = shrink(z - self.gradient(z, y) / self.L, self.theta[k])
            later = (1 + math.sqrt(1 + 4 * t * t)) / 2
            z = new + (t - 1) / later * (new - x)
            x, t = new, later
        return x


class ConstantFISTA(LeastSquares):
    """One momentum, and the look-ahead first."""

    def forward(self, y: Tensor) -> Tensor:
        x = old = y @ self.A
        for _ in range(self.rounds):
            z = x + 0.5 * (x - old)
            old, x = x, functional.softshrink(z - self.gradient(z, y) / self.L, 0.05)
        return x


class Nonnegative(LeastSquares):
    """Accelerated projected gradient steps on x >= 0."""

    def forward(self, y: Tensor) -> Tensor:
        x = old = y @ self.A
        for _ in range(self.rounds):
            z = x + 0.5 * (x - old)
            old, x = x, functional.relu(z - self.gradient(z, y) / self.L)
        return x


class HeavyBall(LeastSquares):
    def forward(self, y: Tensor) -> Tensor:
        x = old = y @ self.A
        for _ in range(self.rounds):
            step = x - self.gradient(x, y) / self.L + 0.4 * (x - old)
            x, old = functional.softshrink(step, 0.05), x
        return x


class ADMM(LeastSquares):
    """Yang et al. 2016: the quadratic part by its inverse, then the threshold, then the multiplier."""

    def __init__(self, *, step: float = 1.0, learned: bool = False, solve: bool = False) -> None:
        super().__init__()
        self.step, self.solve = step, solve
        self.rho = nn.Parameter(torch.tensor(0.7))
        self.prox = network() if learned else None

    def forward(self, y: Tensor) -> Tensor:
        b = y @ self.A
        M = self.A.T @ self.A + self.rho * torch.eye(WIDTH)
        G = torch.linalg.inv(M)
        z, u = b, torch.zeros_like(b)
        for k in range(self.rounds):
            right = b + self.rho * (z - u)
            x = torch.linalg.solve(M, right.mT).mT if self.solve else right @ G
            z = shrink(x + u, self.theta[k]) if self.prox is None else self.prox(x + u)
            u = u + self.step * (x - z)
        return z


class ChambollePock(LeastSquares):
    """The dual state on a ball of the maximum norm, the primal one by the prox of a square."""

    def __init__(self, extrapolation: float = 1.0, *, adjoint: bool = True) -> None:
        super().__init__()
        self.extrapolation, self.adjoint = extrapolation, adjoint
        self.K, self.other = nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, WIDTH, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        x = ahead = b = y @ self.A
        d = torch.zeros(len(y), 12)
        for _ in range(self.rounds):
            d = d + 0.4 * self.K(ahead)
            d = d / torch.clamp(d.abs(), min=1.0)
            back = d @ self.K.weight if self.adjoint else self.other(d)
            old, x = x, (x - 0.3 * back + 0.3 * b) / 1.3
            ahead = x + self.extrapolation * (x - old)
        return x


class LearnedPrimalDual(LeastSquares):
    """Adler and Oktem 2018: networks in the place of both proximal maps, the operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.dual = nn.ModuleList(network(3 * MEASURED, MEASURED) for _ in range(self.rounds))
        self.primal = nn.ModuleList(network(2 * WIDTH, WIDTH) for _ in range(self.rounds))

    def forward(self, g: Tensor) -> Tensor:
        f, h = torch.zeros(len(g), WIDTH), torch.zeros_like(g)
        for dual, primal in zip(self.dual, self.primal, strict=True):
            h = h + dual(torch.cat([h, f @ self.A.T, g], 1))
            f = f + primal(torch.cat([f, h @ self.A], 1))
        return f


class LearnedPrimalDualOfImages(nn.Module):
    """The same with a memory of several channels in both spaces, and the operator as a module."""

    def __init__(self, rounds: int = 6, channels: int = 3) -> None:
        super().__init__()
        self.rounds, self.channels = rounds, channels
        self.there, self.back = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.dual = nn.ModuleList(self.network(channels + 2) for _ in range(rounds))
        self.primal = nn.ModuleList(self.network(channels + 1) for _ in range(rounds))

    def network(self, inputs: int) -> nn.Module:
        last = nn.Conv2d(6, self.channels, 3, padding=1)
        return nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.PReLU(6), last)

    def forward(self, g: Tensor) -> Tensor:
        f = torch.zeros(len(g), self.channels, *g.shape[2:])
        h = torch.zeros_like(f)
        for dual, primal in zip(self.dual, self.primal, strict=True):
            h = h + dual(torch.cat([h, self.there(f[:, 1:2]), g], 1))
            f = f + primal(torch.cat([f, self.back(h[:, :1])], 1))
        return f[:, :1]
