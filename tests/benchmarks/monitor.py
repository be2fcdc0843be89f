"""What a monitor costs in a training step: python -m tests.benchmarks.monitor

Every way of watching has a copy of the same model and trains it on the same batches; the ways take turns, step by step,
in random order, in one process of one thread. Time is CPU time. A cycle has ten steps, one of which ``every=10``
records; the time of a cycle is the sum over its places of the median over the rounds. A line gives that over the time
of the unwatched model, less one, in percent, and the quartiles of the same over resampled rounds. ``economy, clip``
trains with ``monitor.clip_grad_norm_`` and is set against a model that is clipped by torch. Below stands what a monitor
holds in memory after a full ring buffer of records.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import os
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor

CYCLE = 10

Array = np.ndarray[Any, np.dtype[Any]]


class GPT(nn.Module):
    """GPT-2 from transformers with a language model's loss."""

    def __init__(self) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            n_layer=4,
            n_embd=256,
            n_head=8,
            vocab_size=512,
            n_positions=128,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits.flatten(0, 1)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        *[part for _ in range(32) for part in (nn.Linear(width, width), nn.Tanh())], nn.Linear(width, 10)
    )


def resnet18() -> nn.Module:
    return importlib.import_module("torchvision").models.resnet18(num_classes=10)


Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]
CASES: dict[str, Case] = {
    "MLP, 33 blocks of width 512, batch 128": (
        lambda: mlp(512),
        lambda: (torch.randn(128, 512), torch.randint(10, (128,))),
    ),
    "MLP, 33 blocks of width 256, batch 128": (
        lambda: mlp(256),
        lambda: (torch.randn(128, 256), torch.randint(10, (128,))),
    ),
    "ResNet-18, batch 32 of 32x32": (resnet18, lambda: (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))),
    "GPT-2, 4 layers of width 256, 8x128 tokens": (
        GPT,
        lambda: (torch.randint(512, (8, 128)), torch.randint(512, (8 * 128,))),
    ),
}


class Unwatched:
    """A training run; the ways of watching add to it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.watch(loss)
        self.optimizer.step()

    def watch(self, loss: Tensor) -> None:
        """What is done between the backward pass and the optimizer's step."""


class Clipped(Unwatched):
    """Clips its gradient."""

    def watch(self, loss: Tensor) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)


class Watched(Unwatched):
    """Has a monitor."""

    def __init__(self, model: nn.Module, every: int, *, clip: bool = False, writing: bool = False) -> None:
        super().__init__(model)
        self.clip = clip
        directory = tempfile.mkdtemp() if writing else None
        self.monitor = Monitor(self.model, every, optimizer=self.optimizer, directory=directory)

    def watch(self, loss: Tensor) -> None:
        if self.clip:
            self.monitor.clip_grad_norm_(self.model.parameters(), 1.0)
        self.monitor.step(loss)


class ForeachNorm(Unwatched):
    """The plain loop: the norm of every parameter and gradient by fused calls, on the host."""

    def watch(self, loss: Tensor) -> None:
        parameters = [p.detach() for p in self.model.parameters()]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.seen = torch.stack([*torch._foreach_norm(parameters), *torch._foreach_norm(gradients)]).tolist()


class Lightning(Unwatched):
    """Lightning's ``grad_norm``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.grad_norm: Any = importlib.import_module("lightning.pytorch.utilities").grad_norm

    def watch(self, loss: Tensor) -> None:
        self.seen = {name: float(value) for name, value in self.grad_norm(self.model, 2).items()}


class Wandb(Unwatched):
    """``wandb.watch`` of gradients at every step, into an offline run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
        self.run = wandb.init(dir=tempfile.mkdtemp(), settings=settings)
        self.run.watch(self.model, log="gradients", log_freq=1)

    def watch(self, loss: Tensor) -> None:
        self.run.log({"loss": float(loss.detach())})


WAYS: dict[str, tuple[Callable[[nn.Module], Unwatched], str | None]] = {
    "economy, every=10": (lambda m: Watched(m, 10), None),
    "economy, every=1": (lambda m: Watched(m, 1), None),
    "economy, every=10, records and capsules on disk": (lambda m: Watched(m, 10, writing=True), None),
    "economy, every=1, records and capsules on disk": (lambda m: Watched(m, 1, writing=True), None),
    "economy, clip, every=1": (lambda m: Watched(m, 1, clip=True), None),
    "_foreach_norm of parameters and gradients": (ForeachNorm, None),
    "lightning grad_norm": (Lightning, "lightning"),
    "wandb.watch": (Wandb, "wandb"),
}


def seconds(run: Unwatched, x: Tensor, y: Tensor) -> float:
    start = time.process_time()
    run.step(x, y)
    return time.process_time() - start


def compare(name: str, case: Case, rounds: int) -> None:
    build, draw = case
    torch.manual_seed(0)
    model = build()
    runs: dict[str, Unwatched] = {"none": Unwatched(model), "clipped": Clipped(model)}
    for way, (make, package) in WAYS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"  skipped: {way}: {package} is not installed")
        else:
            runs[way] = make(model)
    order = random.Random(0)
    times = {way: np.zeros((rounds, CYCLE)) for way in runs}
    for number in range(-1, rounds):  # the first round warms up
        for place in range(CYCLE):
            x, y = draw()
            for way in order.sample(list(runs), len(runs)):
                times[way][number, place] = seconds(runs[way], x, y)
    print(f"{name}: a step takes {1e3 * cycle(times['none']) / CYCLE:.1f} ms, {rounds} rounds of {CYCLE} steps")
    rng = np.random.default_rng(0)
    for way in list(runs)[2:]:
        floor = times["clipped" if "clip" in way else "none"]
        picks = [rng.integers(rounds, size=rounds) for _ in range(400)]
        spread = [100 * (cycle(times[way][pick]) / cycle(floor[pick]) - 1) for pick in picks]
        low, high = np.quantile(spread, [0.25, 0.75])
        print(f"  {way:<50} {100 * (cycle(times[way]) / cycle(floor) - 1):7.2f} %   ({low:.2f} to {high:.2f})")
    for run in runs.values():
        if isinstance(run, Watched):
            run.monitor.close()
        if isinstance(run, Wandb):
            run.run.finish()


def cycle(times: Array) -> float:
    """Seconds of a cycle, from those of its steps in many rounds; ``(rounds, CYCLE)``."""
    return float(np.median(times, axis=0).sum())


def memory(name: str, case: Case) -> None:
    """What a monitor with a full ring buffer holds, by Python's own account and by the size of its arrays."""
    build, draw = case
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, y = draw()
    x, y = x[:2], y[: 2 * len(y) // len(x)]
    monitor = Monitor(model, 1, optimizer=optimizer)
    monitor.detach()
    tracemalloc.start()
    monitor = Monitor(model, 1, optimizer=optimizer)
    for _ in range(monitor.records.maxlen or 0):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    del loss
    held = [trace for trace in tracemalloc.take_snapshot().statistics("filename") if _ours(trace)]
    print(f"{name}: {sum(trace.size for trace in held) / 2**20:.2f} MB after {len(monitor.records)} records")
    tracemalloc.stop()
    monitor.close()


def _ours(trace: Any) -> bool:
    return f"{os.sep}stabkit{os.sep}" in trace.traceback[0].filename or "numpy" in trace.traceback[0].filename


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: case for name, case in CASES.items() if options.only in name}
    for name, case in cases.items():
        compare(name, case, options.rounds)
        sys.stdout.flush()
    print("\nmemory beside the capsule")
    for name, case in cases.items():
        memory(name, case)


if __name__ == "__main__":
    main()
