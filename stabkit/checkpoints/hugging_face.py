"""A Hugging Face directory -> the model its config describes, with the weights beside it; no network, no code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.bounds import bounded_by
from stabkit.checkpoints.directories import SINGLE
from stabkit.checkpoints.files import read_file, regular_file
from stabkit.checkpoints.matching import misfit
from stabkit.checkpoints.model_names import optional, seeded
from stabkit.checkpoints.state_dict import find_weights
from stabkit.errors import CheckpointError, did_you_mean

_INDICES = tuple(f"{name}.index.json" for name in SINGLE)
_JSON_LIMIT = 2**26


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, huge, or not a JSON object.
    """
    regular_file(path)
    if path.stat().st_size > _JSON_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size >> 20} MiB; expected a small JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a directory's weights: one file, or the shards that its index names.

    Raises:
        CheckpointError: there are none, a shard is missing, or the index points outside the directory.
    """
    for single in SINGLE:
        if (folder / single).exists():
            return [folder / single]
    for index in _INDICES:
        if (folder / index).exists():
            return [folder / name for name in _shards(folder / index)]
    raise CheckpointError(
        f"{folder} has no weights: expected {', '.join((*SINGLE, *_INDICES))}; it holds "
        f"{', '.join(sorted(p.name for p in folder.iterdir())[:8])}"
    )


def read_weights(folder: Path, *, trust_pickle: bool = False) -> tuple[dict[str, Tensor], str]:
    """Every tensor of a directory, and where they come from."""
    tensors: dict[str, Tensor] = {}
    files = weight_files(folder)
    for file in files:
        found = find_weights(read_file(file, trust_pickle=trust_pickle).content)
        if not found:
            raise CheckpointError(f"{file} holds no tensors with names")
        part = found[0].tensors
        twice = sorted(set(part) & set(tensors))
        if twice:
            raise CheckpointError(f"{file} repeats tensors of another shard: {', '.join(twice[:8])}")
        tensors.update(part)
    return tensors, files[0].name if len(files) == 1 else f"{len(files)} shards"


def load_directory(
    folder: Path, *, trust_pickle: bool = False, seed: int = 0
) -> tuple[nn.Module, str, tuple[str, ...]]:
    """The model of a directory with ``config.json``; its name, and sentences on what was loaded.

    The architecture is the class that the config names, built by transformers in float32 and with eager
    attention, which has a derivative everywhere. transformers maps old names to new ones; that every tensor
    found its place is checked.

    Raises:
        CheckpointError: the config or the weights are missing, damaged, or do not fit one another; or the
            config asks for code of its own (``auto_map``).
    """
    model_class, settings = architecture(folder)
    tensors, origin = read_weights(folder, trust_pickle=trust_pickle)
    before = set(tensors)
    with building(folder, model_class, seed), bounded_by(tensors, str(folder / "config.json")):
        module, info = model_class.from_pretrained(
            None,  # no path, so nothing is looked up: the config and the tensors are all there is
            config=settings,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are collected, and refused below
            **{_dtype_keyword(): torch.float32},
            attn_implementation="eager",
        )
    _refuse_misfit(folder, model_class.__name__, info)
    notes = [f"{origin}: {len(before)} tensors", f"architecture {model_class.__name__} of transformers"]
    stored = set(module.state_dict())
    other = sorted(before - stored)
    if other:
        notes.append(f"renamed or recomputed by transformers: {', '.join(other[:6])}" + " ..." * (len(other) > 6))
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()} - {"float32"}
    if dtypes:
        notes.append(f"cast from {', '.join(sorted(dtypes))} to float32")
    result: nn.Module = module
    return result.eval(), model_class.__name__, tuple(notes)


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; expected tensor name -> file name")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # the name itself must stay inside; links are followed, the hub's own cache is made of them
        if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index} points outside its directory: {name!r}; expected plain file names")
        if Path(name).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index} names {name!r}; expected .safetensors or .bin files")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index} names {name}, which is not in {index.parent}: copy every shard")
    return names


def architecture(folder: Path) -> tuple[Any, Any]:
    """The class and the config object that ``config.json`` of a directory describes.

    Raises:
        CheckpointError: it is missing, damaged or unknown to transformers, or asks for code of its own (``auto_map``).
    """
    config = read_json(folder / "config.json")
    if config.get("auto_map"):
        raise CheckpointError(
            f"{folder / 'config.json'} asks for code of its own (auto_map), which is not run; import its class "
            "yourself and give model= (--model pkg.mod:factory)"
        )
    transformers = optional("transformers", f"the Hugging Face directory {folder}")
    settings = dict(config)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        known = list(transformers.CONFIG_MAPPING)
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know{did_you_mean(str(model_type), known)}"
        )
    with _quiet():
        try:
            built = transformers.CONFIG_MAPPING[model_type].from_dict(settings)
        except Exception as error:  # a config class validates with whatever it likes
            raise CheckpointError(
                f"{folder / 'config.json'} is not a valid {model_type} config: {type(error).__name__}: {error}"
            ) from error
    for part in (built, *(v for v in vars(built).values() if isinstance(v, transformers.PretrainedConfig))):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False  # it would be downloaded
    return _model_class(transformers, folder, config, type(built)), built


def _model_class(transformers: Any, folder: Path, config: dict[str, Any], config_class: type) -> Any:
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise CheckpointError(f"{folder / 'config.json'}: architectures is {named!r}; expected a list of class names")
    if not named:
        try:
            return transformers.AutoModel._model_mapping[config_class]
        except KeyError as error:
            raise CheckpointError(
                f"{folder / 'config.json'} names no architectures, and transformers has no base model for it"
            ) from error
    found = getattr(transformers, str(named[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / 'config.json'} names the architecture {named[0]!r}, which transformers "
            f"{transformers.__version__} does not have; give --model pkg.mod:factory"
        )
    return found


def _refuse_misfit(folder: Path, name: str, info: dict[str, Any]) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [
        f"{key}: {'x'.join(map(str, ours))} in the file, {'x'.join(map(str, theirs))} in the model"
        for key, ours, theirs in sorted(info["mismatched_keys"])
    ]
    if shapes:
        raise CheckpointError(
            f"{folder}: {len(shapes)} tensors have another shape than config.json says: {'; '.join(shapes[:8])}"
        )
    if missing or unexpected or info.get("error_msgs"):
        raise CheckpointError(f"{folder}, {name}: {misfit(missing, unexpected)}")


def _dtype_keyword() -> str:
    version = optional("transformers", "a Hugging Face directory").__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"  # renamed in 4.56


@contextlib.contextmanager
def building(folder: Path, model_class: Any, seed: int) -> Iterator[None]:
    """Build a model of transformers inside: seeded, without its progress bars, and with its errors in one message.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    try:
        with seeded(seed), _quiet():
            yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises anything for a config it cannot build
        raise CheckpointError(
            f"transformers cannot build {model_class.__name__} from {folder / 'config.json'}: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers; what they say is in the notes or in an error."""
    logging = optional("transformers", "a Hugging Face directory").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
