"""The state dict inside whatever was saved: a training dict, a Lightning checkpoint, averaged weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.matching import match_names
from stabkit.checkpoints.pickles import Array, Namespace
from stabkit.errors import CheckpointError, did_you_mean

_KNOWN = (
    "state_dict",
    "current_model_state",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
)
_OTHER = re.compile(r"optim|sched|scaler|rng|grad|momentum|criterion|loss|metric|callback|loops", re.IGNORECASE)
_AVERAGED = re.compile(r"(^|[_.])(ema|swa|averaged?|shadow)([_.]|$)|^n_averaged$|shadow_params", re.IGNORECASE)
_COUNTERS = ("n_averaged", "initted", "step", "num_updates")  # what averages count beside their tensors
_DEPTH = 4
_HARMLESS = 2**28  # bytes that an expanded tensor may take when it is copied


@dataclass(frozen=True)
class Weights:
    """A set of tensors found in a file.

    Attributes:
        path: the keys that lead to it, outermost first.
        tensors: by the names the file gives them; an unnamed list is under ``"0"``, ``"1"``, ...
        averaged: whether it is an average over training (EMA, SWA).
        named: False for a list in the order of ``model.parameters()``.
        metadata: torch's module versions.
        ignored: entries beside the tensors that are no weights.
    """

    path: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    averaged: bool = False
    named: bool = True
    metadata: Mapping[str, Any] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The path as ``--key`` takes it."""
        return ".".join(self.path) or "the file itself"


def find_weights(saved: Any) -> list[Weights]:
    """Every set of tensors in a saved object, down to four levels, shallow ones first.

    Example:
        >>> import torch
        >>> [w.key for w in find_weights({"model": {"w": torch.ones(2)}, "epoch": 3})]
        ['model']
    """
    found = list(_walk(saved, (), set()))
    return sorted(found, key=lambda w: len(w.path))


def choose_weights(
    found: list[Weights], model: nn.Module | None, *, key: str | None = None, weights: str = "raw"
) -> tuple[Weights, tuple[str, ...]]:
    """The set of tensors to load, and sentences that say why.

    Args:
        found: what :func:`find_weights` returned.
        model: the architecture; the set whose names fit it best is preferred.
        key: the path to the set, joined by dots; a prefix of names inside a set works as well.
        weights: ``"raw"`` or ``"ema"``.

    Raises:
        CheckpointError: there is no such set.
    """
    if not found:
        raise CheckpointError("no tensors with names were found; expected a state dict or a dictionary that holds one")
    if key is not None:
        taken = _by_key(found, key)
        return taken, (f"key {key!r}, as asked",)
    wanted = [w for w in found if w.averaged == (weights == "ema")]
    notes: list[str] = []
    if not wanted and weights == "ema":
        raise CheckpointError(f"weights='ema' was asked for, but no averaged weights were found; found: {_keys(found)}")
    if not wanted:
        notes.append("only averaged weights (EMA) are in the file: these were taken")
        wanted = found
    names = list(model.state_dict()) if model is not None else []
    ranked = sorted(wanted, key=lambda w: _rank(w, names))
    taken = ranked[0]
    notes.insert(0, f"key {taken.key!r}" if taken.path else "the file is the state dict itself")
    notes.append("averaged weights (EMA)" if taken.averaged else "raw weights")
    others = [w for w in found if w is not taken and not _OTHER.search(w.key)]
    if others:
        notes.append(f"not taken: {_keys(others)} (--key, --weights)")
    if taken.ignored:
        notes.append(f"ignored, not weights: {', '.join(taken.ignored[:8])}")
    return taken, tuple(notes)


def arrange(weights: Weights, found: list[Weights], model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors by name, when the file lists them in the order of ``model.parameters()`` (torch_ema).

    Buffers, which such a list lacks, come from the raw weights beside it.

    Raises:
        CheckpointError: the list has another length, or there are no raw weights for the buffers.
    """
    if weights.named:
        return weights.tensors
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(names) != len(weights.tensors):
        raise CheckpointError(
            f"{weights.key} lists {len(weights.tensors)} tensors, but the model has {len(names)} trainable parameters"
        )
    raw = [w for w in found if w.named and not w.averaged]
    arranged = dict(zip(names, weights.tensors.values(), strict=True))
    if set(model.state_dict()) <= set(arranged):
        return arranged
    if not raw:
        raise CheckpointError(f"{weights.key} holds parameters only, and the file has no raw weights for the buffers")
    beside = choose_weights(raw, model)[0]
    renamed = match_names(beside.tensors, model.state_dict()).renamed
    return {**{renamed.get(n, n): t for n, t in beside.tensors.items()}, **arranged}


def architecture_hint(saved: Any) -> str:
    """A sentence on the architecture that a training dict names, or nothing."""
    entries = saved if isinstance(saved, Mapping) else {}
    places = [entries, *(entries.get(name) for name in ("args", "hyper_parameters", "config", "cfg"))]
    for place in places:
        table = place.entries if isinstance(place, Namespace) else place
        for name in ("arch", "architecture", "model_name", "model"):
            value = table.get(name) if isinstance(table, Mapping) else None
            if isinstance(value, str):
                return f" Its entry {name!r} says {value!r}: perhaps timm:{value} or torchvision:{value}"
    return ""


def _walk(value: Any, path: tuple[str, ...], seen: set[int], averaged: bool = False) -> Iterator[Weights]:
    if id(value) in seen or len(path) > _DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        value = value.state_dict()
    averaged = averaged or any(_AVERAGED.search(part) for part in path)
    if isinstance(value, list) and path and path[-1] == "shadow_params" and all(isinstance(t, Tensor) for t in value):
        yield Weights(path, {str(i): t for i, t in enumerate(value)}, averaged=True, named=False)
    if not isinstance(value, Mapping):
        return
    entries = {k: v.tensor() if isinstance(v, Array) else v for k, v in value.items() if isinstance(k, str)}
    tensors = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    check_claims(tensors)
    # Lightning's WeightAveraging puts the average under the usual name, and the raw weights beside it
    swapped = "current_model_state" in entries and "averaging_state" in entries
    inner = [
        w
        for k, v in entries.items()
        if k not in tensors
        for w in _walk(v, (*path, k), seen, averaged or (swapped and k == "state_dict"))
    ]
    if tensors and (not inner or any("." in name for name in tensors)):
        metadata = getattr(value, "_metadata", None)
        yield from _groups(
            Weights(
                path,
                tensors,
                averaged=averaged or "n_averaged" in tensors,
                metadata=metadata if isinstance(metadata, Mapping) else None,
                ignored=tuple(k for k in entries if k not in tensors and not k.endswith("_extra_state")),
            )
        )
    yield from inner


def check_claims(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are much larger than what is stored: a stride of 0 lets one number claim to be any number.

    Raises:
        CheckpointError: a tensor would take more than 256 MiB, and more than four times what is stored for it.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() * tensor.itemsize <= _HARMLESS:
            continue
        if tensor.numel() * tensor.itemsize > 4 * tensor.untyped_storage().nbytes():
            held = tensor.untyped_storage().nbytes()
            raise CheckpointError(f"{name} claims {tensor.numel()} numbers and has {held} bytes; it is forged")


def _groups(weights: Weights) -> Iterator[Weights]:
    """Split averaged weights that lie beside the raw ones in one flat dictionary (``ema.layer.weight``)."""
    heads = {name.partition(".")[0] for name in weights.tensors if name not in _COUNTERS}
    averaged = {head for head in heads if _AVERAGED.search(head)}
    if not averaged or averaged == heads:
        yield weights
        return
    if weights.averaged:  # a model inside of an average may have a part of such a name as well
        yield weights
    counters = tuple(n for n in weights.tensors if n in _COUNTERS)
    raw = {n: t for n, t in weights.tensors.items() if n.partition(".")[0] not in averaged and n not in counters}
    yield Weights(weights.path, raw, metadata=weights.metadata, ignored=weights.ignored + counters)
    for head in sorted(averaged):
        inside = {n: t for n, t in weights.tensors.items() if n.partition(".")[0] == head}
        counters = tuple(n for n in inside if n.partition(".")[2] in _COUNTERS)
        inside = {n: t for n, t in inside.items() if n not in counters}
        yield Weights((*weights.path, head), inside, averaged=True, metadata=weights.metadata, ignored=counters)


def _by_key(found: list[Weights], key: str) -> Weights:
    for weights in found:
        if ".".join(weights.path) == key:
            return weights
    for weights in found:
        prefix = key.removeprefix(".".join(weights.path)).lstrip(".") + "."
        inside = {n: t for n, t in weights.tensors.items() if n.startswith(prefix)}
        if inside:
            return Weights((*weights.path, prefix[:-1]), inside, weights.averaged, metadata=weights.metadata)
    names = [".".join(w.path) for w in found]
    raise CheckpointError(f"key {key!r} leads to no tensors{did_you_mean(key, names) or '.'} Found: {_keys(found)}")


def _rank(weights: Weights, model_names: list[str]) -> tuple[Any, ...]:
    match = match_names(weights.tensors, model_names) if model_names and weights.named else None
    last = weights.path[-1] if weights.path else ""
    return (
        not (match is not None and match.exact),
        bool(_OTHER.search(weights.key)) and bool(weights.path),
        -len(match.renamed) if match is not None else 0,
        _KNOWN.index(last) if last in _KNOWN else len(_KNOWN),
        len(weights.path),
        -len(weights.tensors),
    )


def _keys(found: list[Weights]) -> str:
    return ", ".join(f"{w.key!r} ({len(w.tensors)} tensors{', averaged' * w.averaged})" for w in found[:8])
