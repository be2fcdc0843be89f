"""From residual to plain by one coefficient: damping the skip, on handwritten digits.

x' = (1 - lambda) x + F(x) is a residual block at lambda = 0 and a plain layer at lambda = 1 (In-ResNet; Yang, Liu, Bao
and Shi, ICML 2020). Networks of 16 blocks are trained alike for several lambda. What to see in the picture: as lambda
grows, the disc of stability slides to the right, and the gradient that reaches the input shrinks by a factor per block;
a little damping costs nothing, much damping ends the training. On the right, the accuracy on images with noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import stabkit
from stabkit import plotting

DAMPING = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
NOISE = (0.0, 0.2, 0.4, 0.6, 0.8)


class Block(nn.Module):
    """(1 - lambda) x + F(x)."""

    def __init__(self, width: int, damping: float) -> None:
        super().__init__()
        self.damping = damping
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        return (1 - self.damping) * x + self.branch(x)


def train(damping: float, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A network of 16 blocks after 250 steps of Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), *[Block(32, damping) for _ in range(16)], nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(250):
        pick = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[pick]), labels[pick]).backward()
        optimizer.step()
    return model.eval()


def main(out: Path) -> None:
    """Train, measure and draw; the picture goes to ``out``."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16 - 0.5, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = np.random.default_rng(0).permutation(len(images))
    known, new = order[:1200], order[1200:]

    def loss(output: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, labels[new[:64]])

    figure = Figure(figsize=(12, 3.4), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plotting.sliding_disc(ax=left)
    for place, damping in enumerate(DAMPING):
        model = train(damping, images[known], labels[known])
        flow = stabkit.trace(model, images[new[:64]])
        growth = stabkit.gradient_profile(flow, loss).log_growth.mean(1)
        fields = stabkit.identify(flow)
        color = plotting.style.sample_color(middle, place, len(DAMPING))
        total = torch.cat([growth.flip(0).cumsum(0).flip(0), torch.zeros(1)])
        middle.plot(total, color=color, label=f"λ = {damping:g}")
        noise = torch.Generator().manual_seed(0)
        right_answers = []
        for size in NOISE:
            seen = images[new] + size * torch.randn(images[new].shape, generator=noise)
            right_answers.append(float((model(seen).argmax(1) == labels[new]).float().mean()))
        right.plot(NOISE, right_answers, ".-", color=color)
        print(
            f"lambda {damping:4.2f}: read as {fields[3].name!r}, gradient x {growth.sum().exp():.3g} from output to "
            f"input, {right_answers[0]:.1%} right, {right_answers[2]:.1%} with noise of 0.4"
        )
    middle.set(xlabel="step (input left)", ylabel="log gradient, from output (nats)", title="Gradient")
    middle.legend(fontsize=8)
    right.set(xlabel="noise on the images", ylabel="right answers", title="Accuracy", ylim=(0, 1))
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("damped_residual_network.png"))
