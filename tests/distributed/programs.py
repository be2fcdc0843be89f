"""What the ranks of a test run; every program returns plain data."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


def residual(width: int = 16, depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width) for _ in range(depth)]).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers)


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(count: int, program: str, *, timeout: float = 120, die: int | None = None) -> list[Any]:
    """What ``program`` (one of ``PROGRAMS``) returned on every rank; None for one that died.

    The processes are forked from a server that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "stabkit.distributed", "torch.distributed.fsdp"])
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        running = [
            context.Process(target=one_rank, args=(rank, count, port, program, folder, die)) for rank in range(count)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join(timeout)
            if process.is_alive():
                process.kill()
        paths = [Path(folder) / f"{rank}.pkl" for rank in range(count)]
        results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    failed = [result for result in results if isinstance(result, str)]
    assert not failed, failed[0]
    assert [rank for rank, result in enumerate(results) if result is None] == ([] if die is None else [die])
    return results


def one_rank(rank: int, count: int, port: int, program: str, folder: str, die: int | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "STABKIT_TEST_DIES": str(die)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    try:
        result = PROGRAMS[program]()
    except BaseException:
        result = traceback.format_exc()
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    os._exit(0)  # ranks do not wait for one that has died


@functools.cache
def together(count: int) -> list[dict[str, Any]]:
    """What the quick programs return on so many ranks, from one start of the processes."""
    return on_ranks(count, "everything")


def everything() -> dict[str, Any]:
    return {
        "profiles": profiles(),
        "analysed": analysed(),
        "shared": shared(),
        "streamed": streamed(),
        "compared": compared(),
    }


def profiles() -> dict[str, Any]:
    """Profiles of several models, with random cotangents and with losses that join samples."""
    from stabkit.distributed import gradient_profile

    def contrast(out: torch.Tensor) -> torch.Tensor:
        return (out @ out.T).logsumexp(1).sum()

    model, x = residual(), batch(6, 16)
    images = batch(5, 3, 8, 8)
    found = {
        "cotangents": gradient_profile(model, x, probes=4, seed=3),
        "loss": gradient_profile(model, x, loss=contrast),
        "one sample": gradient_profile(model, x[:1], probes=4),
        "fewer samples than ranks": gradient_profile(model, x[:3], probes=2),
        "images": gradient_profile(convolutional().eval(), images, probes=2, depth="modules"),
        "mixing": gradient_profile(convolutional().train(), images, probes=2),
        "whole": gradient_profile(model, x, batch_dim=None, probes=2),
    }
    return {
        name: {
            "growth": profile.log_growth,
            "all": profile.all_log_growth,
            "gradients": profile.gradient_norms,
            "states": profile.state_norms,
            "batch": profile.batch,
            "loss": profile.loss,
            "below": profile.below,
        }
        for name, profile in found.items()
    }


def shared() -> dict[str, Any]:
    """Pieces of work, who did them, and a failure that is told everywhere."""
    from stabkit.distributed import RankError, current

    ranks, mine = current(), []

    def work(piece: int) -> int:
        mine.append(piece)
        return piece**2

    def fails(piece: int) -> int:
        if piece == 1:
            raise ValueError("no such piece")
        return piece

    results = ranks.share(work, [3.0, 1.0, 2.0, 1.0, 1.0])
    try:
        ranks.share(fails, [1.0] * 4, name="step")
    except (RankError, ValueError) as error:
        return {"results": results, "mine": mine, "error": str(error), "type": type(error).__name__}
    return {}


def analysed() -> Any:
    """Reports of one model, with and without a loss."""
    from stabkit.analysis import analyze

    reports = [
        analyze(residual(depth=3), batch(6, 16), probes=3),
        analyze(residual(depth=3), batch(4, 16), loss=lambda out: out.square().sum(), spectrum="none"),
    ]
    found = [report.to_dict() for report in reports]
    for report in found:
        report.pop("seconds")
    return found


def streamed() -> dict[str, Any]:
    """A small tower, streamed from its files."""
    from stabkit.streaming import analyze_files
    from tests.streaming.models import Tower, saved, tokens, tower

    (folder,) = broadcast(tempfile.mkdtemp())
    if not dist.is_initialized() or dist.get_rank() == 0:
        saved(Path(folder), tower())
    broadcast()
    found = [analyze_files(folder, tokens(), model=Tower, probes=3, out=Path(folder) / "out") for _ in range(2)]
    assert [one.reused for one in found] == [0, 10] or dist.is_initialized()
    told = found[0].to_dict()
    return {name: told[name] for name in ("all_log_growth", "gradient_norms", "singular_values", "gains", "methods")}


def compared() -> list[Any]:
    """Two checkpoints, the second time from the cache."""
    import stabkit

    (folder,) = broadcast(tempfile.mkdtemp())
    if not dist.is_initialized() or dist.get_rank() == 0:
        for index, gain in enumerate((1.0, 2.0)):
            torch.save({n: gain * p for n, p in residual(depth=2).state_dict().items()}, f"{folder}/{index}.pt")
    broadcast()
    sources = [f"{folder}/{index}.pt" for index in range(2)]
    options = {"model": residual(depth=2), "input": batch(2, 16), "cache": f"{folder}/cache"}
    found = [stabkit.compare(sources, **options) for _ in range(2)]
    return [[(s.cached, s.report.total_growth) for s in one.snapshots if s.report] for one in found]


def dying() -> dict[str, Any]:
    """One rank leaves in the middle of its work."""
    from stabkit.distributed import RankError, current

    folder = Path(tempfile.mkdtemp())
    ranks = current(keep=folder)

    def work(piece: int) -> float:
        if os.environ["STABKIT_TEST_DIES"] == str(ranks.rank):
            os._exit(9)
        return piece / 2

    try:
        ranks.share(work, [1.0] * 4, name="step")
    except RankError as error:
        kept = [path.read_text() for path in folder.glob("*.json")]
        return {"error": str(error), "finished": error.finished, "kept": kept}
    return {}


def wrapped() -> dict[str, Any]:
    """One model wrapped in every way that spreads it over ranks, and what an unwrapped one gives."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import stabkit
    from stabkit import distributed

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(**options: Any) -> nn.Module:
        model = residual()
        for block in model:
            fully_shard(block, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    def split() -> nn.Module:
        model = residual()
        for block in model:
            parallelize_module(block, mesh, {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
        return model

    models = {
        "plain": residual(),
        "ddp": nn.parallel.DistributedDataParallel(residual()),
        "fully_shard": sharded(),
        "fully_shard kept": sharded(reshard_after_forward=False),
        "fully_shard bf16": sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)),
        "tensor parallel": split(),
    }
    x, found = batch(4, 16), {}
    for name, model in models.items():
        before = [type(p).__name__ for p in model.parameters()]
        hooks = [list(m._forward_pre_hooks) + list(m._forward_hooks) for m in model.modules()]
        profile = distributed.gradient_profile(model, x, probes=2)
        report = stabkit.analyze(model, x, spectrum="krylov")
        flow = stabkit.trace(model, x)
        dense = flow.steps[1].jacobian().dense()
        found[name] = {
            "growth": profile.log_growth,
            "norms": [step.largest_singular_value for step in report.steps],
            "dense": dense,
            "same": before == [type(p).__name__ for p in model.parameters()]
            and hooks == [list(m._forward_pre_hooks) + list(m._forward_hooks) for m in model.modules()],
            "parameters": before[0],
        }
    found["alone"] = refused_alone(models["fully_shard"], x)
    found["loaded"] = loaded_from_parts(models["fully_shard"], [sharded(), split()], x)
    model = models["fully_shard"].train()
    model(x).square().sum().backward()  # training goes on
    found["trained"] = all(p.grad is not None for p in model.parameters())
    return found


def refused_alone(model: nn.Module, x: torch.Tensor) -> str:
    """What is said of a model in parts that one rank is to analyse alone."""
    import stabkit

    try:
        stabkit.analyze(model, x, distributed=False)
    except stabkit.StabkitError as error:
        return str(error)
    return ""


def loaded_from_parts(source: nn.Module, targets: list[nn.Module], x: torch.Tensor) -> list[dict[str, Any]]:
    """A distributed checkpoint of a model in parts, loaded into others in parts: what changed about each of them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    import stabkit

    (folder,) = broadcast(tempfile.mkdtemp())
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder)
    found = []
    for model in targets:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
            before = [(id(p), type(p).__name__) for p in model.parameters()]
            stabkit.load(folder, model=model, input=x)
            same = before == [(id(p), type(p).__name__) for p in model.parameters()]
            found.append({"difference": float((model(x) - residual()(x)).abs().max()), "same": same})
    return found


def broadcast(*items: Any) -> list[Any]:
    """What the first rank gives; all ranks wait for it."""
    told = list(items) or [None]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told


def meeting() -> dict[str, Any]:
    """Calls that do not agree, on one rank alone, and of a rank that comes late."""
    import logging

    import stabkit
    from stabkit.distributed import RankError, ranks

    rank, x, found = dist.get_rank(), batch(2, 16), {}
    try:
        stabkit.analyze(residual(), x + rank, spectrum="none")
    except RankError as error:
        found["other input"] = str(error)
    if rank == 0:
        found["alone"] = stabkit.analyze(residual(), x, spectrum="none", distributed=False).verdict
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stabkit").addHandler(handler)
    ranks._PATIENCE = 0.2
    dist.barrier()
    if rank == 1:
        time.sleep(1.5)
    found["verdict"] = stabkit.analyze(residual(), x, spectrum="none").verdict
    found["said"] = records
    found["raised"] = raising()
    return found


def raising() -> str:
    """What a piece of work says about the model is raised on every rank, as one process would raise it."""
    from stabkit.distributed import current

    def work(piece: int) -> int:
        if piece:
            raise ZeroDivisionError(f"piece {piece}")
        return piece

    try:
        current().share(work, [1.0, 1.0, 1.0])
    except ZeroDivisionError as error:
        return str(error)
    return ""


def labelled(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches of unequal size for `residual`, and targets."""
    whole, targets = batch(4 * count, 16), batch(4 * count, 16).flip(0)
    sizes = [1 + i % 3 for i in range(2 * count - 1)]
    sizes.append(4 * count - sum(sizes))
    return list(whole.split(sizes)), list(targets.split(sizes))


def curvature() -> dict[str, Any]:
    """The sharpness of one loss, of a model wrapped in several ways, with the batches shared by the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from stabkit.curvature import critical_rate, sharpness
    from stabkit.distributed import current

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def spread() -> nn.Module:
        model = residual()
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    xs, ys = labelled(4)
    pairs = list(zip(xs, ys, strict=True))
    told: dict[str, Any] = {}
    for name, model in (
        ("plain", residual()),
        ("ddp", nn.parallel.DistributedDataParallel(residual())),
        ("fully_shard", spread()),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for x, y in pairs[:2]:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        options = {"loss": nn.functional.mse_loss, "batches": pairs, "optimizer": optimizer, "ranks": current()}
        found, rate = sharpness(model, tol=1e-6, **options), critical_rate(model, **options)
        told[name] = {
            "values": found.values.tolist(),
            "preconditioned": found.preconditioned.tolist(),
            "gauss_newton": found.gauss_newton.tolist(),
            "interval": found.interval,
            "loss": found.loss,
            "rate": rate.rate,
            "products": found.n_products,
        }
    return told


def refusing() -> dict[str, Any]:
    """What every rank is told of a loss that one of them refuses, and three batches for two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from stabkit.curvature import critical_rate, sharpness
    from stabkit.distributed import current
    from stabkit.errors import StabkitError

    spread = fully_shard(residual(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    pairs = list(zip(*labelled(3), strict=True))
    told: dict[str, Any] = {}
    for name, model in (("plain", residual()), ("fully_shard", spread)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        common = {"ranks": current(), "optimizer": optimizer}
        few = {"tol": 1e-2, "own": 0}
        found = sharpness(model, loss=nn.functional.mse_loss, batches=pairs, **common, **few)
        told[name] = {"values": found.values.tolist()}
        for at in (1, 2):  # the first batch of the second rank, which goes through one, and the last of the first
            wrong = [(x, y[:, :-1] if i == at else y) for i, (x, y) in enumerate(pairs)]
            for measure in (sharpness, critical_rate):
                try:
                    measure(model, loss=nn.functional.mse_loss, batches=wrong, **common)
                except StabkitError as error:  # noqa: PERF203
                    told[name][f"{measure.__name__} {at}"] = str(error)
        refused = {"ranks": current(), "optimizer": None if dist.get_rank() else "mine"}
        try:
            sharpness(model, loss=nn.functional.mse_loss, batches=pairs, **refused)
        except StabkitError as error:
            told[name]["optimizer"] = str(error)
    return told


PROGRAMS = {function.__name__: function for function in (everything, dying, wrapped, meeting, curvature, refusing)}
