"""Any saved file or model name -> the model and an input for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from stabkit.checkpoints.directories import refuse_other_directories
from stabkit.checkpoints.files import read_file, regular_file
from stabkit.checkpoints.hugging_face import load_directory, read_json, read_weights
from stabkit.checkpoints.inputs import Input, make_inputs
from stabkit.checkpoints.matching import fill, non_finite
from stabkit.checkpoints.names import Model, build_model, is_model_name
from stabkit.checkpoints.state_dict import architecture_hint, arrange, choose_weights, find_weights
from stabkit.errors import CheckpointError


@dataclass(frozen=True)
class Loaded:
    """A model with an input; unpacks as ``model, inputs = load(...)``.

    Attributes:
        model: in evaluation mode.
        inputs: positional arguments of the model.
        kwargs: keyword arguments of the model.
        name: what the model is called.
        description: what was loaded: the tensors used, renamed and ignored, which key, what was stripped,
            averaged weights or raw ones, and where the input comes from; one sentence a line.
        non_finite: names of tensors that hold NaN or infinity.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    description: str = ""
    non_finite: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.inputs

    def to_dict(self) -> dict[str, Any]:
        """What was loaded, without the tensors; ready for JSON."""
        return {
            "name": self.name,
            "model": type(self.model).__name__,
            "inputs": [list(getattr(t, "shape", ())) for t in self.inputs],
            "kwargs": {name: list(getattr(t, "shape", ())) for name, t in self.kwargs.items()},
            "description": self.description,
            "non_finite": list(self.non_finite),
        }


def load(
    source: str | os.PathLike[str],
    *,
    model: Model | None = None,
    input: Input | None = None,
    key: str | None = None,
    weights: str = "raw",
    factory_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
) -> Loaded:
    """The model in a checkpoint, or behind a name, and an input for it.

    Nothing in a file is executed unless ``trust_pickle`` says so, and nothing is downloaded. A factory is
    the caller's own code and is run.

    Args:
        source: a file (state dict, training dict, Lightning checkpoint; ``torch.save`` or safetensors), a
            Hugging Face directory, or a name for the architecture with random weights: ``torchvision:NAME``,
            ``timm:NAME``, ``pkg.mod:factory``, ``file.py:factory``.
        model: the architecture of a state dict: a name as above, a module, or a callable.
        input: a shape (``"1x3x64x64"``), ``"tokens:1x8"``, a file, a tensor or a tuple of them; None asks
            the model itself.
        key: where the weights are in the file, for example ``"state_dict"`` or ``"ema.shadow"``.
        weights: ``"raw"`` or ``"ema"``, when the file has both.
        factory_args: keyword arguments of the factory.
        trust_pickle: unpickle whatever the file asks for, which runs its code.
        seed: seed of random weights and inputs; the global generators are left as they were.

    Returns:
        The model, the input, and what was done to get them.

    Raises:
        CheckpointError: anything that the caller can mend, in one message.

    Example:
        >>> from torch import nn
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": nn.Linear(3, 2).state_dict()}, f"{folder}/last.pt")
        ...     network, inputs = load(f"{folder}/last.pt", model=lambda: nn.Linear(3, 2), input="4x3")
        >>> network(*inputs).shape
        torch.Size([4, 2])
    """
    if weights not in ("raw", "ema"):
        raise CheckpointError(f"weights={weights!r}; expected 'raw' or 'ema'")
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"source is a {type(source).__name__}; expected a path or a model name")
    if not str(source):
        raise CheckpointError("source is empty; expected a path or a model name")
    path = Path(source).expanduser()
    options = _Options(model, key, weights, dict(factory_args or {}), trust_pickle, seed)
    if not _exists(path) and is_model_name(str(source)):
        module, name, notes = _from_name(str(source), options)
    elif path.is_dir():
        module, name, notes = _from_directory(path, options)
    else:
        module, name, notes = _from_file(path, options)
    module.eval()
    made = make_inputs(module, input, name=name, seed=seed)
    lines = [f"source: {source}", *notes, f"input: {made.how}"]
    return Loaded(module, made.args, made.kwargs, name, "\n".join(lines), non_finite(module))


@dataclass(frozen=True)
class _Options:
    model: Model | None
    key: str | None
    weights: str
    factory_args: dict[str, Any]
    trust_pickle: bool
    seed: int

    def refuse(self, what: str, *names: str) -> None:
        """Say which options have no meaning for ``what``, rather than pass over them."""
        unset: dict[str, Any] = {"key": None, "weights": "raw", "factory_args": {}}
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != unset[name]]
        if given:
            raise CheckpointError(f"{', '.join(given)} has no meaning for {what}; leave it out")

    def build(self, model: Model) -> tuple[nn.Module, str]:
        return build_model(model, factory_args=self.factory_args, seed=self.seed)


_Found = tuple[nn.Module, str, tuple[str, ...]]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name with a null byte, or too long for a path
        return False


def _from_name(text: str, options: _Options) -> _Found:
    if options.model is not None:
        raise CheckpointError(
            f"source {text!r} is a model name, and model={options.model!r} names another; "
            "give a checkpoint file as the source, or leave model out"
        )
    options.refuse(f"the model name {text!r}, which has no file of weights", "key", "weights")
    module, name = options.build(text)
    return module, name, (f"{name} with its own initial weights, seed {options.seed}",)


def _from_file(path: Path, options: _Options) -> _Found:
    regular_file(path)
    if path.suffix == ".distcp" or path.name == ".metadata" or path.name.startswith("zero_pp_rank_"):
        refuse_other_directories(path.parent)
    if path.name.endswith(".index.json"):
        return _from_directory(path.parent, options)
    saved = read_file(path, trust_pickle=options.trust_pickle)
    if options.model is None:
        if options.trust_pickle and (module := _pickled_module(saved.content, options.key)) is not None:
            return module, type(module).__name__, (saved.how, "the module that was pickled")
        raise CheckpointError(_needs_model(path, saved.content))
    module, name = options.build(options.model)
    return module, name, (f"format: {saved.how}", *_fill_from(saved.content, module, path, options))


def _fill_from(content: Any, module: nn.Module, path: Path, options: _Options) -> tuple[str, ...]:
    found = find_weights(content)
    try:
        taken, notes = choose_weights(found, module, key=options.key, weights=options.weights)
        filled = fill(module, arrange(taken, found, module), taken.metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    return (*notes, *filled.notes)


def _from_directory(folder: Path, options: _Options) -> _Found:
    refuse_other_directories(folder)
    config = folder / "config.json"
    if options.model is None and config.exists():
        content = read_json(config)
        if "model_type" in content or "architecture" not in content:
            options.refuse(f"{folder}, whose config.json says it all", "key", "weights", "factory_args")
            return load_directory(folder, trust_pickle=options.trust_pickle, seed=options.seed)
        timm_name = f"timm:{content['architecture']}"
        arguments = content.get("model_args")
        known = {k: content[k] for k in ("num_classes", "global_pool") if content.get(k) is not None}
        known.update(arguments if isinstance(arguments, dict) else {})
        options = dataclasses.replace(options, model=timm_name, factory_args={**known, **options.factory_args})
    if options.model is None:
        raise CheckpointError(
            f"{folder} has weights but no config.json to say what they belong to; give the architecture: "
            "--model pkg.mod:factory, file.py:factory, timm:NAME or torchvision:NAME"
        )
    tensors, origin = read_weights(folder, trust_pickle=options.trust_pickle)
    module, name = options.build(options.model)
    return module, name, (f"weights: {origin}", *_fill_from(tensors, module, folder, options))


def _pickled_module(content: Any, key: str | None) -> nn.Module | None:
    """The module in an unpickled object: the object itself, or the entry that holds one."""
    if isinstance(content, nn.Module):
        return content
    entries = content if isinstance(content, Mapping) else {}
    names = [key] if key is not None else ["model", "module", "net", "network", *map(str, entries)]
    return next((entries[n] for n in names if isinstance(entries.get(n), nn.Module)), None)


def _needs_model(path: Path, content: Any) -> str:
    found = find_weights(content)
    if not found:
        return f"{path} holds no tensors with names: it is a {type(content).__name__}; expected a state dict"
    if any(".lora_" in name for name in found[0].tensors):
        return (
            f"{path} is a LoRA adapter: it changes a base model and is none by itself. Merge it into its base "
            "(peft: model.merge_and_unload()), save that, and give that file"
        )
    return (
        f"{path} holds {len(found[0].tensors)} tensors, which is not yet a model; give the architecture: --model "
        f"pkg.mod:factory, file.py:factory, timm:NAME or torchvision:NAME.{architecture_hint(content)}"
    )
