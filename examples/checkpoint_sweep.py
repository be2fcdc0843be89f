"""A run looked at afterwards: how the stability of every block moves from checkpoint to checkpoint.

A residual network of 12 blocks learns handwritten digits with too large a learning rate; its weights are saved every 25
steps. stabkit analyses all checkpoints with the same input and puts them side by side. What to see in the picture: the
total growth of the gradient over training on the left; in the middle the growth of every block, where the first blocks
change most; on the right, how far the spectra reach out of the region.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import nn

from stabkit.comparison import Comparison, compare


class Block(nn.Module):
    """x + F(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step."""
        return x + self.branch(x)


def network() -> nn.Module:
    """The architecture, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), *[Block(32) for _ in range(12)], nn.Linear(32, 10))


def train(folder: Path) -> torch.Tensor:
    """Train and save; returns a batch of images."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(201):
        if step % 25 == 0:
            torch.save({"model": model.state_dict(), "step": step}, folder / f"step-{step}.pt")
        pick = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[pick]), labels[pick]).backward()
        optimizer.step()
    return images[:8]


def main(out: Path) -> None:
    """Train, compare and draw."""
    with TemporaryDirectory() as folder:
        batch = train(Path(folder))
        found: Comparison = compare(sorted(Path(folder).glob("*.pt")), model=network(), input=batch, over_time=True)
    print(found)
    found.save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("checkpoint_sweep.png"))
