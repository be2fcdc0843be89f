"""A training that goes wrong under a monitor: which block moved first, and when.

A residual network learns digits while the monitor records every step. At step 60 the weights of one block are
multiplied by 100, as a broken update would do. What to see in the picture: the growth of the gradient in every block
over the training; the block lights up at the step where it was broken, long before the loss says which block it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from stabkit import Monitor, plotting

BROKEN, WHEN = 7, 60


class Block(nn.Module):
    """x + F(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        return x + 0.3 * self.branch(x)


def main(out: Path) -> None:
    """Train with a planted fault and draw what the monitor saw."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 48), *[Block(48) for _ in range(12)], nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with Monitor(model, every=1, on_alert=lambda finding: print(f"{finding.kind}: {finding.evidence}")) as monitor:
        for step in range(120):
            if step == WHEN:
                with torch.no_grad():
                    model[BROKEN].branch[2].weight *= 100
            pick = torch.randint(0, len(images), (64,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[pick]), labels[pick])
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    print(f"the block that was broken is {BROKEN}; the monitor names {monitor.findings[0].module_path or 'none'} first")
    figure = Figure(figsize=(10, 3.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    plotting.training(monitor.records, left)
    right.plot(
        [record.step for record in monitor.records], [record.loss for record in monitor.records], color="#0072B2"
    )
    right.axvline(WHEN, color="#D55E00", linestyle="--")
    right.set(xlabel="training step", ylabel="loss", title="Loss", yscale="log")
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("diverging_training.png"))
