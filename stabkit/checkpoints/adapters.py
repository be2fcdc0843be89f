"""A LoRA adapter merged into its base model: W + scale B A (Hu et al. 2022, "LoRA", arXiv:2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.files import read_file
from stabkit.checkpoints.hugging_face import read_json
from stabkit.checkpoints.matching import match_names, misfit
from stabkit.checkpoints.state_dict import find_weights
from stabkit.errors import CheckpointError

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.weight)?"
)
# these initialisations take their first B A out of the base weights, which the adapter alone does not tell
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it.

    Attributes:
        folder: where it is.
        config: ``adapter_config.json``.
        pairs: path of a layer -> the adapter's tensors for it, by their names in peft.
        replaced: name of a tensor of the base -> the tensor that takes its place.
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Mapping[str, Tensor]]
    replaced: Mapping[str, Tensor]

    @property
    def base(self) -> str:
        """The base model that the config names."""
        return str(self.config.get("base_model_name_or_path") or "not named")


def needs_base(folder: Path) -> CheckpointError:
    """What is said of an adapter without its base."""
    named = read_json(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).exists() else None
    return CheckpointError(
        f"{folder} is a LoRA adapter: it changes a base model and is none by itself. Give the base model that it was "
        f"trained on, by its config {named or 'not named'}: --base DIRECTORY or FILE (base=...)"
    )


def read_adapter(folder: Path, *, trust_pickle: bool = False) -> Adapter:
    """Read an adapter's directory.

    Raises:
        CheckpointError: files are missing or damaged, or the adapter is of another kind than LoRA.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG} is of type {config['peft_type']!r}; only LORA is merged here: merge it with peft "
            "(model.merge_and_unload()), save that, and give that directory"
        )
    started = str(config.get("init_lora_weights", True)).lower()
    if started.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{folder / CONFIG} was trained from a changed base (init_lora_weights={started!r}), which is not saved "
            "with it; merge it with peft where it was trained, and give the merged model"
        )
    file = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError(f"{folder} has {CONFIG} but no {' or '.join(_FILES)}")
    found = find_weights(read_file(file, trust_pickle=trust_pickle).content)
    if not found:
        raise CheckpointError(f"{file} holds no tensors with names")
    pairs: dict[str, dict[str, Tensor]] = {}
    replaced = {}
    for name, tensor in found[0].tensors.items():
        plain = name.removeprefix("base_model.model.")
        match = _PART.fullmatch(plain)
        if match is not None:
            pairs.setdefault(match["path"], {})[match["part"]] = tensor
        elif ".lora_" in plain:
            raise CheckpointError(f"{file} has {name}, a part of LoRA that is not merged here: merge it with peft")
        else:
            replaced[plain.replace(".base_layer.", ".")] = tensor  # the wrapper that peft puts around a layer
    return Adapter(folder, config, pairs, replaced)


def merge(model: nn.Module, adapter: Adapter) -> tuple[str, ...]:
    """Put an adapter into its base model, in place; sentences on what was changed.

    Raises:
        CheckpointError: the adapter belongs to another model; nothing is changed then.
    """
    slots = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    wanted = [*(f"{path}.weight" for path in adapter.pairs), *adapter.replaced]
    match = match_names(wanted, slots)
    if match.unexpected or not wanted:
        raise CheckpointError(
            f"{adapter.folder} does not belong to {type(model).__name__}: {misfit([], list(match.unexpected))}"
            if wanted
            else f"{adapter.folder} holds no tensors of an adapter"
        )
    merged: dict[str, Tensor] = {}
    for path, parts in adapter.pairs.items():
        name = match.renamed[f"{path}.weight"]
        merged[name] = _merged(path, slots[name].detach(), parts, adapter)
    for given, tensor in adapter.replaced.items():
        name = match.renamed[given]
        if tensor.shape != slots[name].shape:
            raise CheckpointError(
                f"{adapter.folder}: {given} is {tuple(tensor.shape)}, in the base {tuple(slots[name].shape)}"
            )
        merged[name] = tensor.to(slots[name].dtype)
    for name, tensor in merged.items():
        slots[name].data = tensor.to(slots[name].device)
    notes = [f"adapter of {len(adapter.pairs)} layers merged into the base ({_kind(adapter.config)})"]
    if adapter.replaced:
        notes.append(f"taken whole from the adapter: {', '.join(list(adapter.replaced)[:8])}")
    if match.how:
        notes.append(match.how)
    return tuple(notes)


def _merged(path: str, weight: Tensor, parts: Mapping[str, Tensor], adapter: Adapter) -> Tensor:
    embedding = "lora_embedding_A" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if first not in parts or second not in parts:
        raise CheckpointError(f"{adapter.folder}: {path} has {', '.join(parts)}; expected {first} and {second}")
    A, B = parts[first].to(torch.float32), parts[second].to(torch.float32)
    transposed = embedding or bool(adapter.config.get("fan_in_fan_out"))
    if A.shape[0] != B.shape[1]:
        raise CheckpointError(f"{adapter.folder}: {path} has factors of ranks {A.shape[0]} and {B.shape[1]}")
    if B.flatten(1).shape[1] != A.shape[0] or (A.dim() > 2 and weight.shape[1] != A.shape[1]):
        raise CheckpointError(f"{adapter.folder}: {path} is a grouped or transposed convolution: merge it with peft")
    shape = (A.flatten(1).shape[1], B.shape[0]) if transposed else (B.shape[0], A.flatten(1).shape[1])
    if math.prod(shape) != weight.numel() or shape[0] != weight.shape[0]:
        raise CheckpointError(
            f"{adapter.folder}: {path} changes a weight of shape {shape}, but in the base it is {tuple(weight.shape)}"
        )
    delta = B.flatten(1) @ A.flatten(1)
    delta = delta.T if transposed else delta
    changed = weight.to(torch.float32) + _scale(path, A.shape[0], adapter.config) * delta.reshape(weight.shape)
    if "lora_magnitude_vector" in parts:
        changed = _with_magnitude(changed, parts["lora_magnitude_vector"].to(torch.float32), transposed)
    return changed.to(weight.dtype)


def _with_magnitude(changed: Tensor, magnitude: Tensor, transposed: bool) -> Tensor:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): every output's weights get the length that was learned for it."""
    rows = changed.T if transposed else changed
    lengths = rows.flatten(1).norm(dim=1)
    scaled = rows * (magnitude.flatten() / lengths).view(-1, *[1] * (rows.dim() - 1))
    result: Tensor = scaled.T if transposed else scaled
    return result


def _scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha for {path} is {alpha!r} in the adapter's config; expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """The value whose pattern the end of a path matches, as peft reads ``alpha_pattern``."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        plain = re.fullmatch(r"[\w.]+", pattern)  # a pattern of the file could run for ever
        if plain is None:
            raise CheckpointError(f"alpha_pattern {pattern!r} is not a plain path; merge the adapter with peft")
        if path == pattern or path.endswith(f".{pattern}"):
            return value
    return default


def _kind(config: Mapping[str, Any]) -> str:
    kinds: dict[str, Callable[[], bool]] = {
        "rank-stabilised": lambda: bool(config.get("use_rslora")),
        "DoRA": lambda: bool(config.get("use_dora")),
    }
    named = [name for name, holds in kinds.items() if holds()]
    return ", ".join([f"rank {config.get('r')}", f"alpha {config.get('lora_alpha')}", *named])
