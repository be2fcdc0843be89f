"""Why a tanh network of 50 layers does not train, and what to change.

PyTorch's default initialisation gives every layer a gain below one, so the gradient shrinks by a constant factor per
layer: a plain layer far inside its disc |z| <= 1. stabkit names the stretch and computes the factor by which the
weights must grow. What to see in the picture: before, the gradient falls by many orders of magnitude and the training
loss stays where guessing puts it; with the weights multiplied as the remedy says, the gradient keeps its size and the
loss falls.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import stabkit
from stabkit import plotting


def network(layers: int = 50, width: int = 64) -> nn.Sequential:
    """The network as one would write it."""
    torch.manual_seed(0)
    body = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*body, nn.Linear(width, 10))


def losses(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int = 150) -> list[float]:
    """The training loss of 150 steps of Adam."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    found = []
    for _ in range(steps):
        pick = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[pick]), labels[pick])
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def main(out: Path) -> None:
    """Analyse, mend, analyse again, train both and draw."""
    digits = load_digits()
    images = torch.tensor((digits.data - digits.data.mean(0)) / (digits.data.std(0) + 1e-6), dtype=torch.float32)
    labels = torch.tensor(digits.target)
    before = network()
    report = stabkit.analyze(before, images[:16], spectrum="none", name="before")
    print(report.summary)
    finding = report.findings[0]
    print(f"{finding.kind}: {finding.remedy}")

    factor = float(re.search(r"by about ([\d.]+)", finding.remedy)[1])
    after = copy.deepcopy(before)
    for layer in after[:-1]:
        if isinstance(layer, nn.Linear):
            layer.weight.data *= factor
            layer.bias.data.zero_()
    mended = stabkit.analyze(after, images[:16], spectrum="none", name="after")
    print(mended.summary)

    figure = Figure(figsize=(9, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    plotting.compare({"as initialised": report, f"weights × {factor:g}": mended}, left)
    right.plot(losses(before, images, labels), label="as initialised", color="#0072B2")
    right.plot(losses(after, images, labels), "--", label=f"weights × {factor:g}", color="#D55E00")
    right.set(xlabel="training step", ylabel="loss", title="Training on digits", ylim=(0, None))
    right.legend()
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("deep_tanh_network.png"))
