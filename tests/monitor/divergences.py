"""Three short trainings, each with a planted divergence: python -m tests.monitor.divergences

A convolutional network on scikit-learn's digits, a character GPT on the texts that ship with Python, and a deep LSTM on
the same. At a known step a known block is damaged; what the monitor said, when, and how its capsule replays is printed.
"""

from __future__ import annotations

import importlib
import math
import pydoc_data.topics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor, replay


class Convolution(nn.Module):
    """A residual layer of convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(self.norm(x)))


class Digits(nn.Module):
    """A convolutional network for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.layers = nn.ModuleList([Convolution(16) for _ in range(5)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer layer with a causal mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(self.norms[0](x)).chunk(3, -1)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class CharacterGPT(nn.Module):
    """A small GPT on bytes."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.places = nn.Parameter(0.02 * torch.randn(32, width))
        self.layers = nn.ModuleList([Attention(width, 4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).flatten(0, 1)


class CharacterLSTM(nn.Module):
    """LSTM layers on bytes."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.layers = nn.ModuleList([nn.LSTM(width, width, batch_first=True) for _ in range(depth)])
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x).flatten(0, 1)


def digits() -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches of images of digits."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)

    def draw() -> tuple[Tensor, Tensor]:
        pick = torch.randint(len(images), (32,))
        return images[pick], labels[pick]

    return draw


def characters() -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches of text from Python's own help."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")[:200_000]
    tokens = torch.tensor(list(text))

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(tokens) - 33, (16,)).tolist()
        return torch.stack([tokens[i : i + 32] for i in rows]), torch.stack(
            [tokens[i + 1 : i + 33] for i in rows]
        ).flatten()

    return draw


@dataclass(frozen=True)
class Run:
    """A training and the fault planted in it.

    Attributes:
        name: of the run.
        build: the model.
        data: what gives batches.
        block: path of the block that is damaged.
        fault: the damage.
        words: the damage in words.
        kinds: of finding that would be right.
        at: step of the damage.
        steps: how many steps there are.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Callable[[], tuple[Tensor, Tensor]]]
    block: str
    fault: Callable[[nn.Module], Any]
    words: str
    kinds: tuple[str, ...]
    at: int = 60
    steps: int = 80


def times(parameter: str, factor: float) -> Callable[[nn.Module], Any]:
    """Damage: a parameter is multiplied."""
    return lambda model: model.get_parameter(parameter).mul_(factor)


RUNS = (
    Run(
        "convolutions on digits",
        Digits,
        digits,
        "layers.3",
        times("layers.3.conv.weight", 60.0),
        "its kernels are multiplied by 60",
        ("exploding",),
    ),
    Run(
        "character GPT",
        CharacterGPT,
        characters,
        "layers.2",
        times("layers.2.down.weight", 200.0),
        "the weights of its second projection are multiplied by 200",
        ("exploding",),
    ),
    Run(
        "LSTM on characters",
        CharacterLSTM,
        characters,
        "layers.1",
        times("layers.1.weight_hh_l0", math.nan),
        "its recurrent weights become NaN",
        ("non_finite",),
    ),
)


def train(run: Run, directory: Path, *, faulty: bool = True) -> Monitor:
    """The run, watched at every step."""
    torch.manual_seed(0)
    model, draw = run.build(), run.data()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with Monitor(model, 1, directory=directory, optimizer=optimizer) as monitor:
        for step in range(run.steps):
            if faulty and step == run.at:
                with torch.no_grad():
                    run.fault(model)
            x, y = draw()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor


def main() -> None:
    for run in RUNS:
        print(f"{run.name}: at step {run.at} of {run.steps} {run.block} is damaged: {run.words}")
        with tempfile.TemporaryDirectory() as directory:
            print(f"  without the damage: {len(train(run, Path(directory), faulty=False).findings)} findings")
        with tempfile.TemporaryDirectory() as directory:
            monitor = train(run, Path(directory))
            for finding in monitor.findings[:4]:
                print(
                    f"  {finding.severity}: {finding.kind} at {finding.module_path or 'the model'}: {finding.evidence}"
                )
            if len(monitor.findings) > 4:
                print(f"  and {len(monitor.findings) - 4} more")
            for path in monitor.capsules:
                again = replay(path, run.build)
                said = ", ".join(f"{name} {value:.1e}" for name, value in again.differences.items())
                print(f"  {path.name} replayed: {'the same' if again.agrees() else 'NOT the same'} ({said})")
        print()


if __name__ == "__main__":
    main()
