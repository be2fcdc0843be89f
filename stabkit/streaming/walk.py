"""Gradient norms and singular values of a model that does not fit into memory, one block at a time."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.distributed import Ranks, current, fingerprint
from stabkit.errors import ArgumentError, TraceError
from stabkit.identification import identify
from stabkit.jacobians import Jacobian, singular_values
from stabkit.parallel import runs
from stabkit.streaming.meta_model import skeleton, without_weights
from stabkit.streaming.profile import Method, StreamedProfile
from stabkit.streaming.result_cache import Store, key_of
from stabkit.streaming.stack import Block, Progress, run_forward, stack_of
from stabkit.streaming.weights import StreamedWeights, WeightFiles
from stabkit.tracing import Flow, trace
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.randomness import seeded, unchanged_randomness
from stabkit.walk import Observer, Passage, probe_seeds, random_columns, walk_back

_GARBAGE = 2**26  # bytes of weights dropped before memory is swept, which takes a quarter of a second
_VERSION = 2  # of what is kept; results of others are computed again


@accepts
def analyze_files(
    directory: str | os.PathLike[str],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    model: Callable[[], nn.Module] | None = None,
    probes: int = 4,
    k: int = 1,
    tol: float = 1e-3,
    max_products: int = 60,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> StreamedProfile:
    """Growth and largest singular values of every block, with the weights of one block in memory at a time.

    The model's own forward pass runs once over blocks that get their weights from safetensors files when
    they are called and lose them when they return. Then the blocks are taken from the last to the first: each is
    recorded alone, from the state that was kept before it, and standard normal cotangents of the last state are pulled
    back. Peak memory is that of one block with its probes; the states are in ``out``.

    In a distributed program every rank makes this call and gets the result. Each streams the weights for itself, pulls
    back some of the probes and computes the singular values of some of the blocks.

    Args:
        directory: a Hugging Face directory with safetensors files.
        *inputs: what the model is called with, batch first.
        kwargs: keyword arguments of the call.
        model: builds the architecture, when the directory has no ``config.json`` that transformers knows. Its blocks
            must be in one ``ModuleList``, take the state first and return the next.
        probes: random cotangents per sample.
        k: singular values of every block; 0 for none.
        tol: residual at which they count as converged, as a fraction of the largest.
        max_products: the most products that they may take per block.
        dtype: in which weights and states are used, whatever they have in the files.
        device: where blocks are run; weights go there one block at a time.
        out: a directory for states and finished blocks, from which an interrupted run goes on; None keeps them in
            memory. Results are found again by what they were computed from: the bytes of the weights and the input, the
            settings, and the model with its code.
        seed: the seed of the probes.
        progress: called with (done, total, block name), forward and back.
        ranks: who shares the work; by default all ranks of the process group that runs.

    Raises:
        RankError: the ranks were called with different inputs, or one of them failed or is gone.
        CheckpointError: the directory cannot be read, or its tensors do not fit the model.
        TraceError: the blocks form no chain.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> class Tower(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])
        ...     def forward(self, x):
        ...         for block in self.blocks: x = block(x)
        ...         return x
        >>> halves = {f"blocks.{i}.weight": torch.eye(3) / 2 for i in range(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(halves, f"{folder}/model.safetensors")
        ...     found = analyze_files(folder, torch.ones(1, 3), model=Tower)
        >>> [round(float(value), 4) for value in (found.log_growth.sum(), found.singular_values[0, 0, 0])]
        [-1.3863, 0.5]
    """
    began = time.perf_counter()
    _check(k, inputs, kwargs)
    folder = Path(directory)
    files = WeightFiles(folder)
    bare = skeleton(folder, files.shapes) if model is None else _built(model)
    weights = StreamedWeights(bare, files, dtype, torch.device(device))
    blocks = stack_of(bare)
    made = key_of("model", 0, bare)  # before anything of the model is replaced
    store = Store(None if out is None else Path(out))
    args, named = map_tensors([inputs, dict(kwargs or {})], lambda tensor: tensor.to(weights.device))
    ranks = current() if ranks is None else ranks
    ranks.meet("stabkit.streaming.analyze_files", lambda: fingerprint(nn.Module(), inputs, kwargs or {}))
    shares = runs(probes, ranks.count)

    def walk(part: int) -> list[dict[str, Tensor]]:
        first, end = shares[part]
        settings = [
            BlockSettings(first, end - first, k if index % ranks.count == part else 0, tol, max_products, seed)
            for index in range(len(blocks))
        ]
        with unchanged_randomness():
            seeded(0)
            run_forward(bare, blocks, weights, args, named, store, made, progress)
            return _walk_back(blocks, weights, store, settings, progress)

    results = _put_together(ranks.share(walk, [1.0] * ranks.count, name="part"))
    return _profile(bare, blocks, weights, results, store, seed, time.perf_counter() - began)


def _check(k: int, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
    if k < 0:
        raise ArgumentError(f"k={k}; expected at least 0 values")
    bare = [path or "input" for path, tensor in named_tensors([inputs, dict(kwargs or {})]) if tensor.is_meta]
    if bare:
        raise TraceError(f"{', '.join(bare)} on the meta device has no values; give tensors that have")
    if not inputs and not kwargs:
        raise TraceError("no input; give what the model is called with, e.g. torch.randint(1000, (1, 16))")


def _built(model: Callable[[], nn.Module]) -> nn.Module:
    with without_weights():
        return model().eval()


def _walk_back(
    blocks: Sequence[Block],
    weights: StreamedWeights,
    store: Store,
    settings: Sequence[BlockSettings],
    progress: Progress | None,
) -> list[dict[str, Tensor]]:
    """Results of every block, from the last to the first; those that are there already are taken as they are."""
    results: list[dict[str, Tensor]] = []
    below = key_of("cotangent", len(blocks), blocks[-1].following, _VERSION)
    cotangents: Tensor | None = None
    powers: Tensor | None = None
    dropped = 0
    for block in reversed(blocks):
        wanted = settings[block.index]
        key = key_of("block", block.index, below, block.following, vars(wanted), _VERSION)
        known = store.get(key)
        if known is None:
            state = _state(store, block.key).to(weights.device)
            known = measure_block(block, weights, state, cotangents, powers, wanted)
            store.put(key, known)
        else:
            store.found += 1
        cotangents, powers, below = known["cotangents"], known["powers"], key
        results.append({name: value for name, value in known.items() if name != "cotangents"})
        if progress is not None:
            progress(2 * len(blocks) - block.index, 2 * len(blocks), block.name)
        dropped += sum(p.numel() for p in block.module.parameters()) * weights.dtype.itemsize
        if dropped > _GARBAGE:  # recorded graphs hold cycles, and the weights of a block with them
            gc.collect()
            dropped = 0
    return results[::-1]


def _put_together(parts: Sequence[Sequence[Mapping[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Results of every block from those of the ranks: all probes beside one another, singular values of whoever did."""
    found = []
    for of_block in zip(*parts, strict=True):
        whole = dict(of_block[0])
        for name in ("log_after", "log_before"):
            whole[name] = torch.cat([part[name] for part in of_block], dim=1)
        for part in of_block:
            whole.update({name: value for name, value in part.items() if name not in whole})
        found.append(whole)
    return found


def _state(store: Store, key: str) -> Tensor:
    found = store.get(key)
    if found is None:
        raise TraceError(f"the state {key} is gone from {store.folder}; run again")
    return found["state"]


def _profile(
    model: nn.Module,
    blocks: Sequence[Block],
    weights: StreamedWeights,
    results: Sequence[Mapping[str, Tensor]],
    store: Store,
    seed: int,
    seconds: float,
) -> StreamedProfile:
    def stacked(what: str) -> Tensor | None:
        return torch.stack([result[what] for result in results]) if what in results[0] else None

    after, before = (torch.stack([result[what] for result in results]) for what in ("log_after", "log_before"))
    growth = before - after
    logs = torch.cat([before, after[-1:]]).mean(2)
    states = torch.stack([*(result["state_before"] for result in results), results[-1]["state_after"]])
    return StreamedProfile(
        model=type(model).__name__,
        names=tuple(block.name for block in blocks),
        gradient_norms=logs.exp(),
        state_norms=states,
        log_growth=growth.mean(2),
        all_log_growth=growth.permute(2, 0, 1),
        singular_values=stacked("singular_values"),
        residuals=stacked("residuals"),
        converged=stacked("converged"),
        seed=seed,
        reused=store.found,
        weight_bytes=weights.files.n_bytes,
        notes=_held_fixed(blocks),
        gains=torch.stack([result["gain"] for result in results]),
        methods=tuple(as_method(result["method"]) for result in results),
        state_shape=tuple(_state(store, blocks[0].key).shape[1:]),
        block_class=type(blocks[0].module).__name__,
        n_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(weights.dtype).removeprefix("torch."),
        device=str(weights.device),
        chain_error=max(float(result["chain_error"]) for result in results),
        seconds=seconds,
    )


def _held_fixed(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Floating-point tensors that come into a block beside the state: masks, position codes, an encoder's output."""
    block = blocks[-1]
    beside = {f"argument {i}": value for i, value in enumerate(block.args, 2)} | dict(block.kwargs or {})
    found = [path for path, tensor in named_tensors(beside) if tensor.is_floating_point()]
    if not found:
        return ()
    return (f"held fixed in every block, with what they carry: {', '.join(found)}",)


@dataclass(frozen=True)
class BlockSettings:
    """What the results of a block depend on beside its weights and its input.

    Attributes:
        first: number of the first probe.
        probes: how many, from that one on; none when there are more ranks than probes.
        k: singular values.
        tol: the tolerance of these singular values.
        max_products: that they may take.
        seed: the seed of the first of all probes and of the start vectors.
    """

    first: int
    probes: int
    k: int
    tol: float
    max_products: int
    seed: int


class _Source(Observer):
    """Keeps what comes back to the first state."""

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        self.cotangents = passage.leaving


def measure_block(
    block: Block,
    weights: StreamedWeights,
    state: Tensor,
    cotangents: Tensor | None,
    powers: Tensor | None,
    settings: BlockSettings,
) -> dict[str, Tensor]:
    """What one block does to the cotangents of the state after it, and its singular values."""
    with weights.present(block.module.modules()):
        seeded(block.index)  # as it was run forward
        flow = trace(block.step(), state, depth=["module"], seed=settings.seed)
        batch, probes, end = flow.batch, settings.probes, flow.states[-1]
        if cotangents is None or powers is None:
            seeds = probe_seeds(settings.seed, probes, settings.first)
            cotangents, powers = random_columns(flow, seeds), torch.zeros(batch, probes, dtype=torch.float64)
        # two fresh cotangents go along, whose mean growth is that of the Frobenius norm
        generator = torch.Generator().manual_seed(settings.seed + block.index)
        fresh = torch.randn(batch, end.size, 2, generator=generator, dtype=torch.float64)
        columns = torch.cat([cotangents.to(end.space.device), fresh.to(end.space.device, end.space.dtype)], 2)
        source = _Source()
        walk = walk_back(
            flow, columns, observers=[source], powers=torch.cat([powers, torch.zeros(batch, 2, dtype=torch.float64)], 1)
        )
        before, after = walk.log_norms[0], walk.log_norms[-1]
        leaving = source.cotangents
        found = {
            # laid out as it is read back, so that a resumed run adds alike
            "cotangents": leaving.columns[..., :probes].cpu().contiguous(),
            "powers": leaving.powers[:, :probes].contiguous(),
            "log_after": after[:, :probes],
            "log_before": before[:, :probes],
            "state_before": torch.linalg.vector_norm(flow.states[0].flatten().double(), dim=1),
            "state_after": torch.linalg.vector_norm(end.flatten().double(), dim=1),
            "gain": 0.5 * (torch.logsumexp(2 * before[:, probes:], 1) - torch.logsumexp(2 * after[:, probes:], 1)),
            "chain_error": torch.tensor([flow.chain_error if flow.chain_error is not None else math.nan]),
            "method": _as_tensor(_method(flow)),
        }
        if settings.k:
            found.update(_singular(flow.jacobian(), settings))
        for step in flow.steps:
            step.segment.release()
        return found


def _method(flow: Flow) -> Method:
    """What the block is as a whole; in words of its parts where it was cut in several."""
    found = identify(flow, checks=False)
    first = found[0]
    if len(found) == 1:
        return Method(first.name, first.skip, first.evidence, first.residual)
    return Method(", ".join(one.name for one in found), None, "unknown", None)


def _as_tensor(method: Method) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(vars(method)).encode()), dtype=torch.uint8)


def as_method(tensor: Tensor) -> Method:
    """The method that was kept as a tensor of bytes."""
    return Method(**json.loads(bytes(tensor.numpy().tobytes())))


def _singular(J: Jacobian, settings: BlockSettings) -> dict[str, Tensor]:
    k = min(settings.k, *J.shape[1:])
    found = singular_values(
        J, k, tol=settings.tol, max_products=settings.max_products, seed=settings.seed, method="golub-kahan"
    )
    return {
        "singular_values": found.values,
        "residuals": found.residuals,
        "converged": found.converged,
    }
