"""Small directories of weights, and a run that is killed in the middle."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x, scale=1.0):
        return x + scale * self.outer(torch.tanh(self.inner(self.norm(x))))


class Tower(nn.Module):
    def __init__(self, width: int = 12, depth: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 20)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


class Looped(Tower):
    """Not a chain of blocks: the embedding joins again."""

    def forward(self, tokens):
        x = start = self.embedding(tokens)
        for block in self.blocks:
            x = block(x + start)
        return x


def saved(folder: Path, model: nn.Module) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def tower(**options) -> Tower:
    torch.manual_seed(0)
    return Tower(**options).eval()


def tokens() -> torch.Tensor:
    return torch.arange(12).view(2, 6) % 20


def main() -> None:
    """Analyse a directory and kill this process, without a word, after some blocks."""
    from stabkit.streaming import analyze_files

    folder, out, count = sys.argv[1:]

    def die(done: int, total: int, name: str) -> None:
        if done == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    analyze_files(folder, tokens(), model=Tower, probes=2, out=out, progress=die)


if __name__ == "__main__":
    main()
