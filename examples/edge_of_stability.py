"""The edge of stability: sharpness climbs to what the learning rate bears, and stays there.

An update of gradient descent is a step of forward Euler of the gradient flow: along a direction of curvature c it is
stable while c is below 2 / lr. A small network learns handwritten digits by full batches, at three rates, under a
monitor that measures the largest curvature of the loss, the sharpness (Cohen et al., 2021). What to see in the picture:
on the left, the sharpness climbs until it is what the rate bears, and hovers there, whatever the rate; the loss in the
middle falls on all the while, no longer at every step. On the right, a bowl with no such way out: at 3 percent below
its threshold the weights come to rest, at 3 percent above they blow up, and the monitor says so while the loss falls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from stabkit import Monitor

RATES = {0.15: "#0072B2", 0.2: "#D55E00", 0.3: "#009E73"}
STEPS = 1200


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """A few hundred images, all of which are in every batch."""
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    return images[:400], nn.functional.one_hot(labels[:400], 10).float()


def train(rate: float, images: torch.Tensor, targets: torch.Tensor) -> Monitor:
    """A training by full batches, with a look at the sharpness every 5 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def loss() -> torch.Tensor:
        return (model(images) - targets).square().sum(1).mean() / 2

    with Monitor(model, every=5, history=STEPS, optimizer=optimizer, closure=loss, sharpness_every=5) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            monitor.step(value)
            optimizer.step()
    return monitor


class Bowl(nn.Module):
    """Half the sum of curvature theta^2."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(20))
        self.register_buffer("curvature", torch.linspace(0.1, 4.0, 20))

    def forward(self) -> torch.Tensor:
        """The loss."""
        return (self.curvature * self.theta.square()).sum() / 2


def roll(times: float) -> tuple[list[float], Monitor]:
    """The loss at a rate so many times the threshold of the bowl, which is 2 / 4."""
    bowl = Bowl()
    optimizer = torch.optim.SGD(bowl.parameters(), lr=times * 0.5)
    losses = []
    with Monitor(bowl, every=1, blocks=[""], optimizer=optimizer, closure=bowl) as monitor:
        for _ in range(120):
            optimizer.zero_grad()
            value = bowl()
            value.backward()
            monitor.step(value)
            optimizer.step()
            losses.append(float(value.detach()))
    return losses, monitor


def main(out: Path) -> None:
    """Train at three rates, roll down a bowl at two, and draw it."""
    images, targets = digits()
    figure = Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for rate, color in RATES.items():
        monitor = train(rate, images, targets)
        looks = [record.look for record in monitor.records if record.look is not None]
        ratios = [look.found.ratio for look in looks]
        half = ratios[len(ratios) // 2 :]
        print(
            f"rate {rate}: ratio {ratios[0]:.2f} at first, {min(half):.2f} to {max(half):.2f} over the last half; "
            f"findings: {[finding.kind for finding in monitor.findings]}"
        )
        left.plot([look.step for look in looks], [look.found.sharpness for look in looks], color=color)
        left.axhline(2 / rate, color=color, linestyle="--", linewidth=1)
        middle.plot([r.step for r in monitor.records], [r.loss for r in monitor.records], color=color, label=f"{rate}")
    for times, color in ((0.97, "#0072B2"), (1.03, "#D55E00")):
        losses, monitor = roll(times)
        right.plot(losses, color=color, label=f"{times} of the threshold")
        for finding in monitor.findings[:1]:
            print(f"{finding.kind}: {finding.evidence}")
    left.set(xlabel="training step", ylabel="sharpness", title="Sharpness; dashed: 2 / rate", ylim=(0, None))
    middle.set(xlabel="training step", ylabel="loss", title="Loss", yscale="log")
    middle.legend(title="rate", frameon=False)
    right.set(xlabel="training step", ylabel="loss", title="A bowl at two rates", yscale="log")
    right.legend(frameon=False)
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("edge_of_stability.png"))
