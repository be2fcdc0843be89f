"""Reading the tableau off a Neural ODE: which Runge-Kutta method does a solver really use?

The same field is integrated by torchdiffeq's fixed-step solvers and by a loop written by hand. stabkit sees only the
operations that ran, and recovers the coefficients (A, b) and the step size from them. One finding may surprise: the
method that torchdiffeq calls rk4 is Kutta's 3/8 rule, not the classical one. What to see in the picture: the stability
regions of the methods that were read, with h times the eigenvalues of the field.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from matplotlib.figure import Figure
from torch import nn

import stabkit
from stabkit import plotting

STEPS = 5


class Field(nn.Module):
    """dx/dt = A tanh(B x)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The field at one point."""
        return self.down(torch.tanh(self.up(x)))


class Solved(nn.Module):
    """The flow of a field to time 3, by one of torchdiffeq's solvers."""

    def __init__(self, field: nn.Module, method: str) -> None:
        super().__init__()
        self.field, self.method = field, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The state at the end."""
        times = torch.linspace(0, 3, STEPS + 1, dtype=x.dtype)
        return torchdiffeq.odeint(self.field, x, times, method=self.method)[-1]


class ByHand(Solved):
    """The classical Runge-Kutta method, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The state at the end."""
        h, t = 3 / STEPS, torch.zeros(())
        for _ in range(STEPS):
            k1 = self.field(t, x)
            k2 = self.field(t, x + h / 2 * k1)
            k3 = self.field(t, x + h / 2 * k2)
            k4 = self.field(t, x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


def main(out: Path) -> None:
    """Read every solver and draw what was read."""
    torch.manual_seed(0)
    field, x = Field().double(), torch.randn(1, 6, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda state: field(torch.zeros(()), state), x).reshape(6, 6)
    models = {name: Solved(field, name) for name in ("euler", "midpoint", "rk4")} | {"by hand": ByHand(field, "")}
    figure = Figure(figsize=(13, 3.4), dpi=130, layout="constrained")
    for ax, (name, model) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        found = stabkit.identify(stabkit.trace(model, x))[0]
        z = found.step_size * np.linalg.eigvals(slope.detach().numpy())
        plotting.method(found.method, ax, z=z)
        ax.set_title(f"{name}: read as {found.name}", fontsize=9)
        stable = "stable" if found.method.is_stable(z).all() else "NOT stable"
        print(f"{name:9s} read as {found.name}, h = {found.step_size:.3g} ({found.evidence}); {stable} on this field")
        print(np.array2string(np.asarray(found.method.A, dtype=float), precision=4, prefix="  A = "))
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("tableau_of_a_neural_ode.png"))
