"""How much of a gradient's growth the integrator explains: sixty networks, measured beside what was predicted.

A step that is read as one of an integrator has a stability function R, and the values R(z) over the spectrum of its
field predict how much the gradient grows. Here are networks of 16 steps: four fields (Gaussian, antisymmetric, gradient
flow, rotation with damping), at three sizes, under forward Euler, RK4 and a damped skip, with one field for all steps
or a new one in each; and two networks that people use. What to see in the picture: on the left every step for itself,
the mean of |R(z)|^2 over its spectrum; in the middle the energies of the modes carried from step to step, as far as
neighbouring steps share them; on the right with what is not normal as well (`Attribution.applicable`). On the line
everything is explained. Networks with one field for all steps are explained only where modes are carried, since their
gradient turns into the modes that last; Gaussian fields only with what is not normal. Below each panel stand the median
of the share explained and how many networks lie between 0.8 and 1.25.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import stabkit

DEPTH, WIDTH, H = 16, 24, 0.4
GREY, BLUE, ORANGE, GREEN = "#7F7F7F", "#0072B2", "#D55E00", "#009E73"


def gaussian(W: Tensor) -> Tensor:
    """Any direction may grow."""
    return W


def antisymmetric(W: Tensor) -> Tensor:
    """A rotation."""
    return (W - W.T) / math.sqrt(2)


def gradient_flow(W: Tensor) -> Tensor:
    """Downhill: what it linearises to has real eigenvalues below zero."""
    return -(W @ W.T)


def damped_rotation(W: Tensor) -> Tensor:
    """A rotation that loses energy."""
    return antisymmetric(W) - 0.5 * torch.eye(len(W), dtype=W.dtype)


class Block(nn.Module):
    """One step of a method with the field tanh(K x)."""

    def __init__(self, make: Callable[[Tensor], Tensor], gain: float, method: str) -> None:
        super().__init__()
        self.K = nn.Parameter(make(gain * torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)))
        self.method = method

    def field(self, x: Tensor) -> Tensor:
        """f(x)."""
        return torch.tanh(x @ self.K.T)

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        if self.method == "forward Euler":
            return x + H * self.field(x)
        if self.method == "damped skip":
            return 0.9 * x + H * self.field(x)
        k1 = self.field(x)
        k2 = self.field(x + H / 2 * k1)
        k3 = self.field(x + H / 2 * k2)
        k4 = self.field(x + H * k3)
        return x + H / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Repeated(nn.Module):
    """The same block at every step."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """All steps."""
        for _ in range(DEPTH):
            x = self.block(x)
        return x


def networks() -> list[tuple[str, nn.Module, Tensor]]:
    """Name of the group, model and input."""
    found: list[tuple[str, nn.Module, Tensor]] = []
    for make in (gaussian, antisymmetric, gradient_flow, damped_rotation):
        for method in ("forward Euler", "RK4", "damped skip"):
            for gain in (0.5, 1.0, 2.0):
                torch.manual_seed(len(found))
                x = 0.1 * torch.randn(4, WIDTH, dtype=torch.float64)
                new = nn.Sequential(*[Block(make, gain, method) for _ in range(DEPTH)])
                found += [("new field in each step", new.double(), x)]
                if gain < 2.0:
                    found += [("one field", Repeated(Block(make, gain, method)).double(), x)]
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True, norm_first=True) for _ in range(8)]
    found.append(("transformer, plain tanh", nn.Sequential(*layers), torch.randn(2, 6, 16)))
    plain = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    found.append(("transformer, plain tanh", nn.Sequential(*plain), torch.randn(4, WIDTH)))
    return found


def main(out: Path) -> None:
    """Measure all networks and draw what was predicted beside what was measured."""
    names = {
        "spectral": "each step for itself",
        "eigenvalues": "modes carried",
        "persistent": "and what is not normal",
    }
    rows: list[tuple[str, float, dict[str, float]]] = []
    for group, model, x in networks():
        found = stabkit.attribute(stabkit.trace(model, x)).predictions
        rows.append((group, found["spectral"].measured, {name: found[name].predicted for name in names}))
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    colors = {"new field in each step": ORANGE, "one field": BLUE, "transformer, plain tanh": GREEN}
    ends = [min(row[1] for row in rows), max(row[1] for row in rows)]
    for ax, (name, title) in zip(panels, names.items(), strict=True):
        ax.plot(ends, ends, color=GREY, linewidth=1)
        for group, color in colors.items():
            points = np.array([(row[1], row[2][name]) for row in rows if row[0] == group])
            ax.plot(points[:, 0], points[:, 1], "o", color=color, markersize=4, alpha=0.8, label=group)
        shares = np.array([row[2][name] / row[1] for row in rows if abs(row[1]) > 0.2])
        near = int(((shares > 0.8) & (shares < 1.25)).sum())
        text = f"share explained: median {np.median(shares):.2f}, {near} of {len(shares)} near 1"
        ax.set(title=title, xlabel=f"measured growth of the gradient (nats)\n{text}")
        print(f"{title}: {text}")
    panels[0].set_ylabel("predicted growth (nats)")
    panels[0].legend()
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("how_much_the_region_explains.png"))
