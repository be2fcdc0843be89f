"""Antisymmetric, Hamiltonian and momentum networks: three ways to keep a gradient, and what each really keeps.

Four networks of 100 steps on the same data, untrained. A general residual network lets the gradient grow at random. An
antisymmetric one (Haber and Ruthotto, 2017) has eigenvalues on the imaginary axis, where forward Euler is just outside
its disc. A Hamiltonian one (Chang et al., 2018) alternates two half steps: its Jacobian has determinant one, so what
grows is matched by what shrinks. A momentum network (Sander et al., 2021) has determinant gamma^d for every step. What
to see in the picture: the finite-time exponents. Their sum is exactly what the method says; their spread is what the
gradient feels.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import stabkit

DEPTH, WIDTH, H = 100, 16, 0.1


class Residual(nn.Module):
    """x + h tanh(W x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        return x + H * torch.tanh(x @ self.weight.T)


class Antisymmetric(Residual):
    """x + h tanh((W - W^T) x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        return x + H * torch.tanh(x @ (self.weight - self.weight.T).T / math.sqrt(2))


class Hamiltonian(Residual):
    """Symplectic Euler: two halves of the state, one after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        K = self.weight[:, : WIDTH // 2]
        y, z = x.chunk(2, dim=1)
        z = z - H * torch.tanh(y @ K.T) @ K
        y = y + H * torch.tanh(z @ K.T) @ K
        return torch.cat([y, z], 1)


class Momentum(nn.Module):
    """v' = g v + (1 - g) f(x), x' = x + v'."""

    def __init__(self, gamma: float = 0.9) -> None:
        super().__init__()
        self.gamma = gamma
        self.weight = nn.Parameter(torch.randn(WIDTH // 2, WIDTH // 2) / math.sqrt(WIDTH // 2) * 2)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """One step."""
        x, v = state.chunk(2, dim=1)
        v = self.gamma * v + (1 - self.gamma) * torch.tanh(x @ self.weight.T)
        return torch.cat([x + v, v], 1)


def main(out: Path) -> None:
    """Measure all exponents of the four networks and draw them."""
    figure = Figure(figsize=(8, 4), dpi=130, layout="constrained")
    ax = figure.subplots()
    marks = ("o", "s", "^", "D")
    colors = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73")
    for block, mark, color in zip((Residual, Antisymmetric, Hamiltonian, Momentum), marks, colors, strict=True):
        torch.manual_seed(1)
        model = nn.Sequential(*[block() for _ in range(DEPTH)]).double()
        flow = stabkit.trace(model, torch.randn(8, WIDTH, dtype=torch.float64), depth="modules")
        exponents = stabkit.finite_time_exponents(flow).exponents
        growth = stabkit.gradient_profile(flow).log_growth.sum(0).mean()
        ax.plot(exponents.mean(0), mark, color=color, label=block.__name__.lower(), markersize=5)
        print(
            f"{block.__name__.lower():14s} sum of the exponents {exponents.sum(1).mean():+.4f} nats a step, largest "
            f"{exponents[:, 0].mean():+.4f}; the gradient changes by a factor of {growth.exp():.3g} over {DEPTH} steps"
        )
    print(f"the momentum network must have {WIDTH / 2 * math.log(0.9):+.4f}, the Hamiltonian one 0")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlabel="index", ylabel="finite-time exponent (nats per step)", title=f"{DEPTH} steps, h = {H}")
    ax.legend()
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("conservative_networks.png"))
