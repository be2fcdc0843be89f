"""A source -> its weights, or the module they belong to: every kind of file and directory finds its reader here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stabkit.checkpoints import adapters, programs
from stabkit.checkpoints.bounds import bounded_by
from stabkit.checkpoints.capsule_loading import load_capsule
from stabkit.checkpoints.capsules import is_capsule
from stabkit.checkpoints.directories import SINGLE, holds_whole_weights, refuse_other_directories
from stabkit.checkpoints.distributed import Distributed, Placed, distributed_folder, read_distributed
from stabkit.checkpoints.files import read_file, regular_file
from stabkit.checkpoints.hugging_face import load_directory, read_json, read_weights
from stabkit.checkpoints.mapped import read_mapped, tensors_in
from stabkit.checkpoints.matching import fill, release_parameters
from stabkit.checkpoints.model_names import Model, build_model, is_model_name
from stabkit.checkpoints.opened import Opened
from stabkit.checkpoints.state_dict import Weights, architecture_hint, arrange, choose_weights, find_weights
from stabkit.checkpoints.training_progress import step_in_name, training_step
from stabkit.errors import CheckpointError


@dataclass(frozen=True)
class Options:
    """What the caller asked for beside the source; see ``load``."""

    model: Model | None = None
    base: Model | Path | None = None
    key: str | None = None
    weights: str = "raw"
    factory_args: dict[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    allow_export: bool = False
    allow_torchscript: bool = False
    seed: int = 0

    def refuse(self, what: str, *names: str) -> None:
        """Say which options have no meaning for ``what``, rather than pass over them."""
        unset: dict[str, Any] = {"key": None, "weights": "raw", "factory_args": {}, "model": None, "base": None}
        values = {name: getattr(self, name) for name in names if getattr(self, name) != unset[name]}
        given = [f"{n}={type(v).__name__ if isinstance(v, nn.Module) else repr(v)}" for n, v in values.items()]
        if given:
            raise CheckpointError(f"{', '.join(given)} has no meaning for {what}; leave it out")

    def build(self, model: Model) -> tuple[nn.Module, str]:
        """The architecture with random weights, and its name."""
        return build_model(model, factory_args=self.factory_args, seed=self.seed)


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a checkpoint whose architecture is not known.

    Attributes:
        tensors: by name; those of sharded checkpoints are read when they are looked up.
        name: what they are called.
        description: which set was taken, one sentence a line.
    """

    tensors: Mapping[str, Tensor]
    name: str
    description: str


class ArchitectureMissingError(CheckpointError):
    """Weights were found, but nothing says which model they belong to.

    Attributes:
        weights: what was found.
    """

    def __init__(self, message: str, weights: StoredWeights) -> None:
        super().__init__(message)
        self.weights = weights


@dataclass(frozen=True)
class _Archive:
    """What a file or a directory holds.

    ``shards`` is set when the tensors in ``content`` are placeholders, which it reads. ``written`` is what tells that
    a file was written to since it was mapped.
    """

    path: Path
    content: Any
    how: str
    shards: Distributed | None = None
    written: tuple[int, int] | None = None

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Read those that are mapped only."""
        if self.written is not None:
            read_mapped(self.path, tensors, before=self.written)

    def placed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors if self.shards is None else Placed(self.shards, tensors)

    def weights(self) -> list[Weights]:
        try:
            return find_weights(self.content)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def step(self) -> tuple[str, float] | None:
        return training_step(self.content) or step_in_name(self.path)


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint.

    Attributes:
        name: what it is called.
        holds: whether a path is one, told from names and first bytes alone.
        open: what reads it.
    """

    name: str
    holds: Callable[[Path, Options], bool]
    open: Callable[[Path, Options], Opened]


def open_model(source: str, options: Options) -> Opened:
    """The model behind a source, with its weights.

    Raises:
        ArchitectureMissingError: there are weights, but nothing says which model they belong to.
        CheckpointError: anything else that the caller can mend.
    """
    path = Path(source).expanduser()
    if not _exists(path) and is_model_name(source):
        return _from_name(source, options)
    return _open(path, options)


def _open(path: Path, options: Options) -> Opened:
    """What the first of ``FOLDERS`` or ``FILES`` that knows the path makes of it."""
    formats = FOLDERS if path.is_dir() else FILES
    if formats is FILES:
        regular_file(path)
    found = next(known for known in formats if known.holds(path, options))
    if options.weights == "step" and found.open is not _from_capsule:
        options.refuse(f"a {found.name}", "weights")
    return found.open(path, options)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name with a null byte, or too long for a path
        return False


def _from_name(text: str, options: Options) -> Opened:
    if options.model is not None:
        raise CheckpointError(
            f"source {text!r} is a model name, and model={options.model!r} names another; "
            "give a checkpoint file as the source, or leave model out"
        )
    options.refuse(f"the model name {text!r}, which has no file of weights", "key", "weights", "base")
    module, name = options.build(text)
    return Opened(module, name, (f"{name} with its own initial weights, seed {options.seed}",))


def _is_part(path: Path, options: Options) -> bool:
    """Whether a file says little without the directory that it is in."""
    if path.suffix == ".distcp" or path.name == ".metadata" or path.name.startswith("zero_pp_rank_"):
        return True
    if path.name.endswith(".index.json") or path.name == adapters.CONFIG:
        return True
    if path.name.startswith("adapter_model."):
        return (path.parent / adapters.CONFIG).exists()
    return path.name in SINGLE and options.model is None and _names_architecture(path.parent / "config.json")


def _from_capsule(path: Path, options: Options) -> Opened:
    options.refuse("a capsule", "key", "base", *(() if options.weights == "step" else ("weights",)))
    build, seed = options.factory_args, options.seed
    return load_capsule(path, options.model, factory_args=build, seed=seed, weights=options.weights)


def _from_saved(path: Path, options: Options) -> Opened:
    """What ``torch.save`` wrote, or safetensors."""
    saved = read_file(path, trust_pickle=options.trust_pickle, mapped=True)
    archive = _Archive(path, saved.content, saved.how, written=saved.written)
    if options.model is None and options.trust_pickle:
        module = _pickled_module(saved.content, options.key)
        if module is not None:
            archive.read(tensors_in(module))
            notes = (f"format: {saved.how}", "the module that was pickled")
            return Opened(module, type(module).__name__, notes, step=archive.step)
    return _filled(archive, options)


def _from_program(path: Path, options: Options) -> Opened:
    kind = str(programs.kind_of(path))
    options.refuse(f"a {kind}", "key", "weights", "base")
    allowed = options.allow_export if kind == programs.EXPORT else options.allow_torchscript
    program = programs.load_program(path, kind, allowed=allowed)
    step = step_in_name(path)
    if options.model is None:
        options.refuse(f"a {kind} without --model", "factory_args")
        notes = (f"format: {program.how}", "its modules are lost: depth is read from its operations")
        return Opened(program.module, path.name, notes, inputs=program.inputs, step=step)
    module, name = options.build(options.model)
    filled = fill(module, program.module.state_dict())
    return Opened(module, name, (f"format: {program.how}", *filled.notes), inputs=program.inputs, step=step)


def _filled(archive: _Archive, options: Options) -> Opened:
    """The architecture that the options name, with the weights of an archive."""
    options.refuse(f"{archive.path}, which is no LoRA adapter", "base")
    found = archive.weights()
    if options.model is None:
        raise _missing_architecture(archive, options)
    module, name = options.build(options.model)
    if archive.shards is not None and module is not options.model:
        release_parameters(module)  # random weights, which would stand beside those put together from shards
    try:
        taken, notes = choose_weights(found, module, key=options.key, weights=options.weights)
        archive.read(taken.tensors.values())
        arranged = arrange(taken, found, module)
        archive.read(arranged.values())
        filled = fill(module, archive.placed(arranged), taken.metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{archive.path}: {error}") from error.__cause__
    said = (f"format: {archive.how}", *notes, *filled.notes)
    return Opened(module, name, said, non_finite=filled.non_finite, step=archive.step)


def _is_sharded(folder: Path, options: Options) -> bool:
    return not holds_whole_weights(folder) and distributed_folder(folder) is not None


def _from_shards(folder: Path, options: Options) -> Opened:
    sharded = distributed_folder(folder) or folder
    shards = read_distributed(sharded)
    return _filled(_Archive(sharded, shards.content, "distributed checkpoint (DCP), sharded", shards), options)


def _is_adapter(folder: Path, options: Options) -> bool:
    return not holds_whole_weights(folder) and (folder / adapters.CONFIG).exists()


def _says_it_all(folder: Path, options: Options) -> bool:
    """Whether the config beside the weights is one of transformers, and nobody names another architecture."""
    if options.model is not None or not (folder / "config.json").exists():
        return False
    content = read_json(folder / "config.json")
    return "model_type" in content or "architecture" not in content


def _from_hugging_face(folder: Path, options: Options) -> Opened:
    options.refuse(f"{folder}, whose config.json says it all", "key", "weights", "factory_args", "base")
    module, name, notes = load_directory(folder, trust_pickle=options.trust_pickle, seed=options.seed)
    return Opened(module, name, notes, folder, step=step_in_name(folder))


def _from_timm(folder: Path, options: Options) -> Opened:
    config = folder / "config.json"
    content = read_json(config)
    options = dataclasses.replace(
        options, model=f"timm:{content['architecture']}", factory_args=_timm_arguments(content, options)
    )
    tensors, origin = read_weights(folder, trust_pickle=options.trust_pickle)
    with bounded_by(tensors, str(config)):
        return dataclasses.replace(_filled(_Archive(folder, tensors, origin), options), folder=folder)


def _from_weights(folder: Path, options: Options) -> Opened:
    tensors, origin = read_weights(folder, trust_pickle=options.trust_pickle)
    return dataclasses.replace(_filled(_Archive(folder, tensors, origin), options), folder=folder)


def _names_architecture(config: Path) -> bool:
    """Whether there is a config that says which model the weights beside it belong to."""
    return config.exists() and not {"model_type", "architecture"}.isdisjoint(read_json(config))


def _timm_arguments(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What a timm directory says about its model, and over it what the caller says."""
    arguments = config.get("model_args")
    known = {k: config[k] for k in ("num_classes", "global_pool") if config.get(k) is not None}
    return {**known, **(arguments if isinstance(arguments, dict) else {}), **options.factory_args}


def _from_adapter(folder: Path, options: Options) -> Opened:
    if options.base is None:
        raise adapters.needs_base(folder)
    adapter = adapters.read_adapter(folder, trust_pickle=options.trust_pickle)
    if isinstance(options.base, str | Path):
        base = open_model(str(options.base), dataclasses.replace(options, base=None))
    else:
        module, name = options.build(options.base)
        base = Opened(module, name, ())
    notes = adapters.merge(base.module, adapter)
    said = (f"base: {base.name}, by the adapter's config {adapter.base}", *base.notes, *notes)
    return dataclasses.replace(base, notes=said, non_finite=None, step=step_in_name(folder))


def _pickled_module(content: Any, key: str | None) -> nn.Module | None:
    """The module in an unpickled object: the object itself, or the entry that holds one."""
    if isinstance(content, nn.Module):
        return content
    entries = content if isinstance(content, Mapping) else {}
    names = [key] if key is not None else ["model", "module", "net", "network", *map(str, entries)]
    return next((entries[n] for n in names if isinstance(entries.get(n), nn.Module)), None)


def _missing_architecture(archive: _Archive, options: Options) -> CheckpointError:
    found = archive.weights()
    if not found:
        kind = type(archive.content).__name__
        return CheckpointError(f"{archive.path} holds no tensors with names: it is a {kind}; expected a state dict")
    if any(".lora_" in name for name in found[0].tensors):
        return CheckpointError(
            f"{archive.path} is a LoRA adapter without its {adapters.CONFIG}, which says how it scales; give the "
            "directory that peft saved, and its base model with --base"
        )
    taken, notes = choose_weights(found, None, key=options.key, weights=options.weights)
    archive.read(taken.tensors.values())
    said = "\n".join([f"source: {archive.path}", f"format: {archive.how}", *notes])
    return ArchitectureMissingError(
        f"{archive.path} holds {len(taken.tensors)} tensors, which is not yet a model; give the architecture: --model "
        f"pkg.mod:factory, file.py:factory, timm:NAME or torchvision:NAME.{architecture_hint(archive.content)}",
        StoredWeights(archive.placed(taken.tensors), archive.path.name, said),
    )


# in the order in which they are asked; the last of each knows everything that is left, or says what it is
FOLDERS = (
    Format("capsule of a monitor", lambda path, _: is_capsule(path), _from_capsule),
    Format("distributed checkpoint (DCP, FSDP)", _is_sharded, _from_shards),
    Format("LoRA adapter", _is_adapter, _from_adapter),
    Format("none", lambda path, _: not holds_whole_weights(path), lambda path, _: refuse_other_directories(path)),
    Format("Hugging Face directory", _says_it_all, _from_hugging_face),
    Format("timm directory", lambda p, given: given.model is None and (p / "config.json").exists(), _from_timm),
    Format("weights in a directory", lambda path, _: True, _from_weights),
)
FILES = (
    Format("file of a directory", _is_part, lambda path, options: _open(path.parent, options)),
    Format("torch.export program or TorchScript", lambda path, _: programs.kind_of(path) is not None, _from_program),
    Format("torch.save, safetensors", lambda path, _: True, _from_saved),
)
