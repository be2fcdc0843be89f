"""Solvers and equilibria as their papers' repositories write them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .paper import mlp

C, D = 4, 8  # channels, width


def deq() -> nn.Module:
    class DEQ(nn.Module):
        """A fixed point by Anderson acceleration under no_grad, then one call on the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.z, self.x = nn.Linear(D, D), nn.Linear(D, D)
            nn.init.orthogonal_(self.z.weight, 0.5)

        def f(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.z(z) + self.x(x))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z, m = torch.zeros_like(x), 3
                X, Fx = torch.zeros(len(x), m, D, dtype=x.dtype), torch.zeros(len(x), m, D, dtype=x.dtype)
                X[:, 0], Fx[:, 0] = z, self.f(z, x)
                X[:, 1], Fx[:, 1] = Fx[:, 0], self.f(Fx[:, 0], x)
                for k in range(2, 20):
                    n = min(k, m)
                    G = Fx[:, :n] - X[:, :n]
                    H = torch.zeros(len(x), n + 1, n + 1, dtype=x.dtype)
                    H[:, 0, 1:] = H[:, 1:, 0] = 1
                    H[:, 1:, 1:] = G @ G.transpose(1, 2) + 1e-6 * torch.eye(n, dtype=x.dtype)
                    y = torch.zeros(len(x), n + 1, 1, dtype=x.dtype)
                    y[:, 0] = 1
                    alpha = torch.linalg.solve(H, y)[:, 1:, 0]
                    X[:, k % m] = (alpha[:, None] @ Fx[:, :n])[:, 0]
                    Fx[:, k % m] = self.f(X[:, k % m], x)
                z = X[:, k % m]
            return self.f(z, x)

    return DEQ()


class MonDEQ(nn.Module):
    """Forward-backward splitting, unrolled: z <- relu((1 - a) z + a (W z + U x))."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z, u = torch.zeros_like(x), self.U(x)
        for _ in range(6):
            z = functional.relu(0.7 * z + 0.3 * (self.W(z) + u))
        return z


class BDF2(nn.Module):
    """Linear dynamics by BDF2, every step a solve."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(D, D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h, eye = 0.2, torch.eye(D, dtype=x.dtype)
        old, x = x, torch.linalg.solve(eye - h * self.A, x.T).T
        for _ in range(4):
            old, x = x, torch.linalg.solve(eye - 2 / 3 * h * self.A, (4 / 3 * x - 1 / 3 * old).T).T
        return x


class AB2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.h = mlp(D), 0.2

    def forward(self, x: Tensor) -> Tensor:
        old = self.f(x)
        x = x + self.h * old
        for _ in range(5):
            new = self.f(x)
            x, old = x + self.h * (1.5 * new - 0.5 * old), new
        return x


def etd1(m: Any, x: Tensor) -> Tensor:
    c = 0.5
    return math.exp(-c * 0.4) * x + (1 - math.exp(-c * 0.4)) / c * m.parts[0](x)
