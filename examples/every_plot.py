"""Every plot of the package on one sheet, each at the width of a column.

Small models made for the purpose: residual blocks of 24 numbers, a network that moves points of the plane, a recurrent
network, and a short training under a monitor. What to see in the picture: what each plot of `stabkit.plotting` is for,
and that it reads at 6 cm. The title of each panel is the plot's own; `stabkit plot` draws the same from the command
line.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import stabkit
from stabkit import growth, integrators, plotting
from stabkit.plotting.style import CENTIMETER, small_text

WIDTH, HEIGHT, COLUMNS, FONT = 6.0, 5.6, 4, 6.0  # centimetres, points


class Block(nn.Module):
    """x + h f(x) with one hidden layer."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        return x + self.scale * self.f(x)


def trained(model: nn.Module) -> stabkit.Monitor:
    """A short training whose learning rate is too large towards the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(64, 24)
    with stabkit.Monitor(model, every=1, optimizer=optimizer) as monitor:
        for step in range(40):
            optimizer.param_groups[0]["lr"] = 0.05 if step < 25 else 2.0
            optimizer.zero_grad()
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor


def main(out: Path) -> None:
    """Draw every plot and save the sheet."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Block(24, 48, 1.5) for _ in range(10)])
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(10)])
    batch = torch.randn(16, 24)
    descent = torch.optim.SGD(blocks.parameters(), lr=0.5, momentum=0.9)
    updated = stabkit.analyze(blocks, batch, loss=lambda y: (y - batch.flip(1)).square().mean(), optimizer=descent)
    report, other = (stabkit.analyze(model, batch) for model in (blocks, plain))
    flow = stabkit.trace(blocks, batch)
    J = flow.steps[4].jacobian()
    planar = nn.Sequential(*[Block(2, 16, 0.5) for _ in range(8)]).double()
    lines = stabkit.trace(planar, plotting.grid_points().double())
    points = stabkit.trace(planar, plotting.grid_points(lines=13, along=13).double())
    plane = growth.exponent_field(
        lambda x: stabkit.trace(planar, x), torch.zeros(2).double(), tuple(torch.eye(2).double()),
        extent=(-2.0, 2.0, -2.0, 2.0),
    )  # fmt: skip
    mixing = 1.8 * torch.randn(64, 64) / 8
    chaos = stabkit.iterate(lambda x: torch.tanh(x) @ mixing.T, torch.randn(1, 64), 400)
    exponents = stabkit.lyapunov_spectrum(chaos, 12)
    monitor = trained(copy.deepcopy(blocks))

    draws = [
        lambda ax: plotting.region(report, ax),
        lambda ax: plotting.sliding_disc(report, ax),
        lambda ax: plotting.ridgelines(report, ax),
        lambda ax: plotting.growth(report, ax),
        lambda ax: plotting.attribution(report, ax),
        lambda ax: plotting.gradients(report, ax),
        lambda ax: plotting.norms(report, ax),
        lambda ax: plotting.compare({"residual": report, "plain": other}, ax),
        lambda ax: plotting.spectrum(stabkit.eigenvalues(J), ax),
        lambda ax: plotting.spectrum(stabkit.singular_values(J), ax),
        lambda ax: plotting.pseudospectra(J, ax),
        lambda ax: plotting.method(integrators.named("rk4"), ax),
        lambda ax: plotting.lyapunov(exponents, ax),
        lambda ax: plotting.lyapunov_convergence(exponents, ax),
        lambda ax: plotting.sum_rule(exponents, ax),
        lambda ax: plotting.phase_portrait(chaos, ax),
        lambda ax: plotting.flow_map(lines, ax),
        lambda ax: plotting.vector_field(points, ax),
        lambda ax: plotting.exponent_field(plane, ax),
        lambda ax: plotting.training(monitor, ax),
        lambda ax: plotting.update(updated, ax),
    ]
    rows = -(-len(draws) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH * CENTIMETER, rows * HEIGHT * CENTIMETER), dpi=150, layout="constrained")
    for draw, panel in zip(draws, figure.subfigures(rows, COLUMNS).ravel(), strict=False):  # the last row has room
        ax = panel.subplots()
        small_text(ax, FONT)
        draw(ax)
    figure.savefig(out)
    print(f"{len(draws)} plots; the graph of a flow, which is wide, is drawn by: stabkit plot report.json graph")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("every_plot.png"))
