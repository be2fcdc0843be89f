"""The demonstration: two networks of the same depth on handwritten digits, one that trains and one that does not.

Both have twenty blocks of width 64 and are trained in the same way. The residual one computes x + h tanh(W x + b),
forward Euler with the step h = 0.1. The plain one computes sigmoid(W x + b) with PyTorch's default
initialisation, under which each block shrinks the gradient about sevenfold (Glorot and Bengio, AISTATS 2010,
describe how such networks stall).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from stabkit.diagnosis import factor
from stabkit.errors import StabkitError
from stabkit.report import Report, files, formats, tables

if TYPE_CHECKING:
    from rich.console import Console

BLOCKS, WIDTH, CLASSES = 20, 64, 10
STEP = 0.1
EPOCHS, BATCH, LEARNING_RATE = 12, 128, 3e-3
SAMPLES = 32  # test images that are analysed


class EulerBlock(nn.Module):
    """x + h tanh(W x + b), one step of forward Euler."""

    def __init__(self, h: float) -> None:
        super().__init__()
        self.h = h
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 64) -> (batch, 64)``."""
        step: Tensor = x + self.h * torch.tanh(self.linear(x))
        return step


def residual() -> nn.Sequential:
    """The residual network, ``(batch, 64) -> (batch, 10)``.

    Example:
        >>> residual()(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    return _network([EulerBlock(STEP) for _ in range(BLOCKS)])


def plain() -> nn.Sequential:
    """The plain sigmoid network, ``(batch, 64) -> (batch, 10)``.

    Example:
        >>> plain()(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    return _network([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()) for _ in range(BLOCKS)])


def _network(blocks: list[nn.Module]) -> nn.Sequential:
    network = nn.Sequential()
    for i, block in enumerate(blocks):
        network.add_module(f"block{i}", block)
    network.add_module("head", nn.Linear(WIDTH, CLASSES))
    return network


@dataclass(frozen=True)
class Digits:
    """Images ``(n, 64)`` with values from 0 to 1 and their classes ``(n,)``, split for training and testing."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int) -> Digits:
    """The 1797 handwritten digits that come with scikit-learn, a fifth of them for testing.

    Raises:
        StabkitError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise StabkitError('the demo needs scikit-learn for its data: pip install "stabkit[demo]"') from None
    bunch = load_digits()
    images = torch.tensor(bunch.data / 16, dtype=torch.float32)
    classes = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(images)))
    split = len(images) // 5
    test, train = order[:split], order[split:]
    return Digits((images[train], classes[train]), (images[test], classes[test]))


def train(network: nn.Module, data: Digits, seed: int) -> float:
    """Train a network with Adam on the cross entropy and return the share of test images it gets right."""
    images, classes = data.train
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=shuffle)
        for start in range(0, len(images), BATCH):
            batch = order[start : start + BATCH]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[batch]), classes[batch])
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        right = network(data.test[0]).argmax(dim=1) == data.test[1]
    return float(right.float().mean())


@dataclass(frozen=True)
class Outcome:
    """One trained and analysed network."""

    name: str
    accuracy: float
    report: Report


def run(out: Path, seed: int, console: Console, progress: Console) -> list[Outcome]:
    """Train, save, analyse and compare the two networks.

    Args:
        out: the directory for checkpoints, reports and pictures; made if needed.
        seed: seed of data split, weights, batches and analysis; the same seed prints the same text.
        console: where the comparison goes.
        progress: where it is said what is being done.

    Raises:
        StabkitError: scikit-learn is missing, or ``out`` cannot be written.
    """
    from stabkit import plotting

    data = digits(seed)
    _make(out)
    sample = io.BytesIO()
    np.save(sample, data.test[0][:SAMPLES].numpy())
    files.write(out / "digits.npy", sample.getvalue())
    outcomes = [_outcome(factory, data, out, seed, progress) for factory in (residual, plain)]
    contrast = plotting.compare({outcome.name: outcome.report for outcome in outcomes})
    files.write_figure(plotting.figure_of(contrast), out / "contrast.png")
    _compare(outcomes, out, console)
    return outcomes


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StabkitError(f"--out {out}: the directory cannot be made: {error.strerror}") from error


def _outcome(factory: Callable[[], nn.Module], data: Digits, out: Path, seed: int, progress: Console) -> Outcome:
    from stabkit import checkpoints
    from stabkit.analysis import analyze

    name = factory.__name__
    progress.print(f"training the {name} network ...", highlight=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = factory()
    accuracy = train(network, data, seed)
    checkpoint = files.write(out / f"{name}.safetensors", safetensors.torch.save(network.state_dict()))
    progress.print(f"analysing {checkpoint} ...", highlight=False)
    # through the checkpoint, as anyone else would come to it
    loaded = checkpoints.load(checkpoint, model=f"stabkit.demo:{name}", input=str(out / "digits.npy"), seed=seed)
    report = analyze(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, seed=seed, name=loaded.name)
    files.save_all(report, out / name)
    return Outcome(name, accuracy, report)


def _compare(outcomes: list[Outcome], out: Path, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{BLOCKS} blocks of width {WIDTH}, trained alike")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.name, justify="right")
    rows = [_figures(outcome) for outcome in outcomes]
    for label in rows[0]:
        table.add_row(label, *(row[label] for row in rows))
    console.print(table, highlight=False)
    for outcome in outcomes:
        console.print(_sentence(outcome), markup=False, highlight=False)
    for outcome in outcomes:
        for finding in outcome.report.findings:
            told = "\n".join(tables.finding_lines(finding))
            console.print(f"{outcome.name}: {told}", markup=False, highlight=False)
    written = f"Written to {out}: checkpoints, contrast.png, and a report and three pictures for each. Look closer:"
    console.print(f"\n{written}", markup=False, highlight=False)
    for outcome in outcomes:
        console.print(
            f"  stabkit analyze {out / outcome.name}.safetensors --model stabkit.demo:{outcome.name} "
            f"--input {out / 'digits.npy'}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _sentence(outcome: Outcome) -> str:
    report = outcome.report
    radius = formats.figures(_median([s.spectral_radius for s in report.steps if s.spectral_radius is not None]))
    return (
        f"{outcome.name}: from its last block to its first the gradient changes by a factor of "
        f"{factor(report.total_growth)}; the largest eigenvalue of a block is typically {radius} in size."
    )


def _figures(outcome: Outcome) -> dict[str, str]:
    report = outcome.report
    blocks = [step for step in report.steps if step.kind == "step"]
    radii = [step.spectral_radius for step in blocks if step.spectral_radius is not None]
    norms = [step.largest_singular_value for step in blocks if step.largest_singular_value is not None]
    shares = [step.outside_share for step in blocks if step.outside_share is not None]
    low, high = report.total_growth_interval
    return {
        "test images right": f"{outcome.accuracy:.1%}",
        "verdict": report.verdict,
        "method of most blocks": max((step.method for step in blocks), key=[s.method for s in blocks].count),
        "gradient growth, all blocks (nats)": formats.signed(report.total_growth),
        "  interval over samples": f"{formats.signed(low)} to {formats.signed(high)}",
        "  per block": formats.signed(report.total_growth / max(len(blocks), 1)),
        "spectral radius, median": formats.figures(_median(radii)),
        "largest singular value, median": formats.figures(_median(norms)),
        "eigenvalues outside the region": formats.percent(_mean(shares)),
    }


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
