"""Capsules: one training step on disk, with all it takes to run its forward and backward pass again.

A directory with ``capsule.json`` (format, step, structure of the arguments, versions), ``weights.safetensors``,
``batch.safetensors`` (tensors of the arguments, random states, gradients at the outputs), ``records.jsonl`` and, where
there was one, ``before.safetensors``: the last good state of the training, ``weights/NAME``, ``random/NAME`` and
``optimizer/NUMBER/PARAMETER/KEY``. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.checkpoints.files import read_file
from stabkit.errors import CheckpointError

FORMAT = "stabkit.capsule/1"
_MANIFEST, _WEIGHTS, _BATCH, _RECORDS = "capsule.json", "weights.safetensors", "batch.safetensors", "records.jsonl"
_BEFORE = "before.safetensors"
_GROUPS = ("random", "buffers", "gradients")


@dataclass(frozen=True)
class RecordedCall:
    """One forward call of the model during the step.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        random: the state of the random generators before it, as ``randomness.as_tensors`` gives it.
        buffers: buffers that the call changed, as they were before it.
        gradients: gradients of the (scaled) loss with respect to tensors of its output, by their number there.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Capsule:
    """One training step, read back.

    Attributes:
        path: the directory.
        calls: forward calls of the step (micro-batches), process after process.
        complete: whether these are all of them.
        training: whether the model was in training mode.
        unlike: paths of the modules that were in the other mode.
        autocast: dtype by device type, where autocast was on.
        scale: the loss scale of AMP.
        processes: how many trained together.
        record: the record of the step, as a mapping.
        model_factory: what builds the model, when the monitor was told; a hint, since it may be code.
        step: number of the training step.
        reason: why it was written.
        known: what the monitor knew: optimizers with their settings, the last curvatures along updates.
        findings: what it had said, the newest last, as mappings.
        before: of the last good state its ``step``, ``loss``, ``learning_rates``, and the plain ``numbers`` of the
            optimizers' states; or ``why_none``.
        blamed: the training step and the call of a batch from before this step, which is to blame; None where that of
            the step itself is, or none.
    """

    path: Path
    calls: tuple[RecordedCall, ...]
    complete: bool
    training: bool
    unlike: tuple[str, ...]
    autocast: Mapping[str, str]
    scale: float
    processes: int
    record: Mapping[str, Any]
    model_factory: str | None
    step: int
    reason: str
    known: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Mapping[str, Any], ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict)
    blamed: tuple[int, RecordedCall] | None = None

    @property
    def weights_before(self) -> dict[str, Tensor]:
        """The state dict of the last good state; empty where there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        if "step" not in self.before:
            return {}
        held = read_file(self.path / _BEFORE).content
        return {name.removeprefix("weights/"): value for name, value in held.items() if name.startswith("weights/")}

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.path / _WEIGHTS

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records up to this step, as mappings."""
        lines = (self.path / _RECORDS).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def is_capsule(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a capsule directory."""
    return (Path(path) / _MANIFEST).is_file()


def write_capsule(
    path: Path,
    *,
    weights: Mapping[str, Tensor],
    calls: Sequence[RecordedCall],
    manifest: Mapping[str, Any],
    records: Iterable[str],
    before: Mapping[str, Tensor] | None = None,
    blamed: tuple[int, RecordedCall] | None = None,
) -> str:
    """Write a capsule; it appears whole, under its name, or not at all.

    Returns the kind of an argument of the model that it could not hold, so that it cannot be run again; empty for none.

    Args:
        path: the directory to make; its parent is made when missing.
        weights: the state dict.
        calls: the forward calls.
        manifest: further fields of ``capsule.json``, plain values; see `Capsule`.
        records: lines of JSON.
        before: the last good state, by the names of its file.
        blamed: a step before and its call.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    structure = [_encode_call(call, f"{index}/", held) for index, call in enumerate(calls)]
    earlier = None if blamed is None else {"step": blamed[0], "call": _encode_call(blamed[1], "blamed/", held)}
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        save_file(_separate(weights), temporary / _WEIGHTS)
        save_file(_separate(held), temporary / _BATCH)
        if before:
            save_file(_separate(before), temporary / _BEFORE)
        (temporary / _RECORDS).write_text("".join(f"{line}\n" for line in records), encoding="utf-8")
        whole = {"format": FORMAT, **manifest, "calls": structure, "blamed": earlier}
        (temporary / _MANIFEST).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return next((lost for call in structure for part in call.values() if (lost := _lost(part))), "")


def read_capsule(path: str | os.PathLike[str]) -> Capsule:
    """Read a capsule directory.

    Raises:
        CheckpointError: it is not a capsule, or one of its files is damaged.
    """
    directory = Path(path)
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        tensors = read_file(directory / _BATCH).content
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{directory} is no readable capsule: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory / _MANIFEST}: format is not {FORMAT}; written by another version?")
    try:
        return Capsule(
            path=directory,
            calls=tuple(_decode_call(call, f"{i}/", tensors) for i, call in enumerate(manifest["calls"])),
            complete=bool(manifest["complete"]),
            training=bool(manifest["training"]),
            unlike=tuple(map(str, manifest["unlike"])),
            autocast=dict(manifest["autocast"]),
            scale=float(manifest["scale"]),
            processes=int(manifest["processes"]),
            record=dict(manifest["record"]),
            model_factory=None if manifest["model_factory"] is None else str(manifest["model_factory"]),
            step=int(manifest["step"]),
            reason=str(manifest["reason"]),
            known=dict(manifest.get("known", {})),
            findings=tuple(dict(finding) for finding in manifest.get("findings", ())),
            before=dict(manifest.get("before", {})),
            blamed=_decode_blamed(manifest.get("blamed"), tensors),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{directory / _MANIFEST} is damaged: {type(error).__name__}: {error}") from error


def _encode_call(call: RecordedCall, prefix: str, held: dict[str, Tensor]) -> dict[str, Any]:
    for group in _GROUPS:
        held.update({f"{prefix}{group}.{name}": tensor for name, tensor in getattr(call, group).items()})
    return {
        "args": [_encode(item, prefix, held) for item in call.args],
        "kwargs": {name: _encode(item, prefix, held) for name, item in call.kwargs.items()},
    }


def _decode_call(entry: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> RecordedCall:
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    for name, tensor in tensors.items():
        group, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and group in groups:
            groups[group][rest] = tensor
    args = tuple(_decode(item, tensors) for item in entry["args"])
    return RecordedCall(args, {name: _decode(item, tensors) for name, item in entry["kwargs"].items()}, **groups)


def _decode_blamed(entry: Any, tensors: Mapping[str, Tensor]) -> tuple[int, RecordedCall] | None:
    return None if entry is None else (int(entry["step"]), _decode_call(entry["call"], "blamed/", tensors))


def _encode(item: Any, prefix: str, held: dict[str, Tensor]) -> Any:
    """A nest of containers as JSON, its tensors set aside under names."""
    if isinstance(item, Tensor | np.ndarray):
        name = f"{prefix}input.{len(held)}"
        held[name] = torch.as_tensor(item).detach()
        return {"tensor" if isinstance(item, Tensor) else "array": name}
    if item is None or isinstance(item, bool | int | float | str):
        return {"value": item}
    if isinstance(item, list | tuple):
        return {"tuple" if isinstance(item, tuple) else "list": [_encode(child, prefix, held) for child in item]}
    if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        return {"dict": {key: _encode(child, prefix, held) for key, child in item.items()}}
    return {"lost": type(item).__name__}


def _lost(item: Any) -> str:
    """What kind of thing within something encoded was lost; empty for none. Arguments may be called "lost" as well."""
    if isinstance(item, dict):
        if isinstance(item.get("lost"), str):
            return str(item["lost"])
        item = list(item.values())
    return next((lost for child in item if (lost := _lost(child))), "") if isinstance(item, list) else ""


def _decode(item: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = item.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "value":
        return content
    if kind in ("list", "tuple"):
        children = [_decode(child, tensors) for child in content]
        return tuple(children) if kind == "tuple" else children
    if kind == "dict":
        return {key: _decode(child, tensors) for key, child in content.items()}
    raise CheckpointError(f"an argument of the model was a {content}, which a capsule cannot hold")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the host, none sharing memory with another, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != copy.nbytes:
            copy = copy.clone(memory_format=torch.contiguous_format)
        seen.add(copy.untyped_storage().data_ptr())
        found[name] = copy
    return found
