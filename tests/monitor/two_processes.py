"""One process of a run on two, under torchrun.

python -m torch.distributed.run --nproc-per-node 2 -m tests.monitor.two_processes DIRECTORY
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stabkit.monitor import Monitor
from tests.monitor.networks import Layers
from tests.processes import leave

STEPS = 12
FAULT = 10
POISONED = (7, 1)  # a step, and the process whose batch holds a NaN in its second micro-batch


def network() -> nn.Module:
    return Layers(width=6, depth=3).double()


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, inner: nn.Module, rank: int, world: int, directory: Path | None, fail: bool = False
) -> Monitor:
    """Twelve steps, with a capsule on request, micro-batches, clipping, and a block that becomes NaN near the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, 1, directory=directory, optimizer=optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        if step == 3 and directory is not None:
            monitor.capsule()
        if step == FAULT:
            with torch.no_grad():
                for parameter in inner.layers[1].parameters():
                    parameter.mul_(math.nan)
        for part in batch(step).chunk(2):
            loss = model(part.chunk(world)[rank]).square().mean() / 2
            loss.backward()
        monitor.clip_grad_norm_(model.parameters(), 0.05)
        if fail and rank == 1 and step == 5:
            monitor._collector.collect = None  # what follows breaks in this process alone
        monitor.step(2 * loss)
        optimizer.step()
    monitor.close()
    return monitor


def train_on_poison(model: nn.Module, rank: int, world: int, every: int, directory: Path) -> Monitor:
    """Twelve steps of two micro-batches, of which one in one process holds a NaN."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, every, directory=directory, optimizer=optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [part.chunk(world)[rank].clone() for part in batch(step).chunk(2)]
        if (step, rank) == POISONED:
            parts[1][0, 3] = math.nan
        total = 0.0
        for part in parts:
            loss = model(part).square().mean() / 2
            loss.backward()
            total += loss.detach()
        monitor.step(total)
        optimizer.step()
    monitor.close()
    return monitor


def wrapped(kind: str, world: int) -> tuple[nn.Module, nn.Module]:
    """The model as it is called, and the network inside."""
    inner = network()
    if kind != "fsdp":
        return nn.parallel.DistributedDataParallel(inner), inner
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(inner, mesh=mesh), inner


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for kind in ("ddp", "fsdp", "failing"):
        place = directory / kind
        place.mkdir(exist_ok=True)
        model, inner = wrapped(kind, world)
        monitor = train(model, inner, rank, world, place, fail=kind == "failing")
        said = {
            "records": [record.to_dict() for record in monitor.records],
            "findings": [finding.to_dict() for finding in monitor.findings],
            "capsules": [str(path) for path in monitor.capsules],
        }
        (place / f"rank{rank}.json").write_text(json.dumps(said))
    for every in (1, 10):
        place = directory / f"poisoned{every}"
        place.mkdir(exist_ok=True)
        monitor = train_on_poison(wrapped("ddp", world)[0], rank, world, every, place)
        said = {"findings": [f.to_dict() for f in monitor.findings], "capsules": [str(p) for p in monitor.capsules]}
        (place / f"rank{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
    leave()
