"""A distributed checkpoint (DCP, FSDP): its metadata read as data, its tensors put together from their shards.

The format is that of ``torch.distributed.checkpoint``: ``.metadata`` is a pickle that says which part of which tensor
stands where in the ``.distcp`` files, and every part is what ``torch.save`` writes. torch unpickles the metadata
without restriction; here no name in it is imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from stabkit.checkpoints.files import read_part, reading, regular_file
from stabkit.checkpoints.pickles import Inert, globals_asked, refuse_code
from stabkit.checkpoints.training_progress import STEP_NAMES
from stabkit.errors import CheckpointError

_METADATA_LIMIT = 2**28
_PART_OF_NO_MODEL = re.compile(r"optim|sched|scaler|rng", re.IGNORECASE)


class Stored(Inert):
    """Stands for a class of the metadata: its arguments and its state as the pickle gives them."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def entry(self, name: str) -> Any:
        """One attribute of the object that this stands for."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"the metadata lacks {name!r}")
        return self.state[name]


class Bytes(Stored):
    """Stands for the record of something that is no tensor."""


_CONVERT = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
_DCP = "torch.distributed.checkpoint"
_PATHS = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.0 had two of the classes
_RECORDS: Mapping[str, type[Any]] = {
    **{f"{_SHARDED}.{n}": Stored for n in ("TensorProperties", "MEM_FORMAT_ENCODING")},
    **{f"{_DCP}.metadata.{n}": Stored for n in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "StorageMeta")},
    **{f"{_DCP}.metadata.{n}": Stored for n in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")},
    f"{_DCP}.metadata.BytesStorageMetadata": Bytes,
    **{f"{_DCP}.filesystem.{n}": Stored for n in ("_StorageInfo", "_StoragePrefix")},
    **{f"{module}.{n}": Stored for module in ("pathlib", "pathlib._local") for n in _PATHS},
    "torch.Size": Stored,
    "torch.serialization._get_layout": Stored,
    "collections.OrderedDict": OrderedDict,
}


class _Reader(pickle._Unpickler):
    """Builds records and plain containers; imports nothing.

    The unpickler in Python, not the one in C: its memo is a dictionary, which no forged index can inflate.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _RECORDS:
            return _RECORDS[f"{module}.{name}"]
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a distributed checkpoint")


@dataclass(frozen=True)
class _Part:
    """Where one block of a tensor stands: in the tensor, and in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class Distributed:
    """The tensors of a distributed checkpoint; each is read when it is asked for.

    Attributes:
        content: what was saved, nested as it was, with an empty meta tensor in the place of each tensor and None
            in the place of anything else, save the count of training steps.
        folder: where the files are.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], parts: Mapping[int, tuple[_Part, ...]]) -> None:
        self.folder = folder
        self.content = content
        self._parts = parts  # by identity of the meta tensor, which `content` keeps alive

    def read(self, placeholder: Tensor) -> Tensor:
        """The tensor that a meta tensor of ``content`` stands for.

        Raises:
            CheckpointError: a shard is damaged or is not what the metadata says.
        """
        parts = self._parts[id(placeholder)]
        shape, dtype = tuple(placeholder.shape), placeholder.dtype
        if len(parts) == 1 and parts[0].sizes == shape:
            return self._block(parts[0], dtype)
        # what no part covers shows as NaN
        whole = torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)
        for part in parts:
            block = self._block(part, dtype)
            where = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
            whole[where] = block
        return whole

    def _block(self, part: _Part, dtype: torch.dtype) -> Tensor:
        found = read_part(_bytes_of(part), part.file)
        if not isinstance(found, Tensor) or tuple(found.shape) != part.sizes or found.dtype != dtype:
            shown = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(
                f"{part.file} holds {shown} where {self.folder / '.metadata'} says {dtype} {part.sizes}; "
                "the files are of different saves: copy the whole directory again"
            )
        return found.detach()


class Placed(Mapping[str, Tensor]):
    """Tensors by name, each read from its shards when it is looked up."""

    def __init__(self, source: Distributed, placeholders: Mapping[str, Tensor]) -> None:
        self._source = source
        self._placeholders = placeholders

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(self._placeholders[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._placeholders)

    def __len__(self) -> int:
        return len(self._placeholders)


def distributed_folder(folder: Path) -> Path | None:
    """The folder itself or the one inside it that is a distributed checkpoint of a model; None when there is none.

    Raises:
        CheckpointError: several folders inside are.
    """
    if _is_distributed(folder):
        return folder
    found = [child for child in sorted(folder.iterdir()) if child.is_dir() and _is_distributed(child)]
    models = [child for child in found if not _PART_OF_NO_MODEL.search(child.name)] or found
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds several distributed checkpoints; give one: {', '.join(str(m) for m in models[:8])}"
        )
    return next(iter(models), None)


def read_distributed(folder: Path) -> Distributed:
    """Read the metadata of a distributed checkpoint, and check it against the files.

    Raises:
        CheckpointError: the metadata asks for code, is damaged, points outside the directory, or claims more than
            the files hold.
    """
    path = folder / ".metadata"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has shards (.distcp) but no .metadata, which says what they hold; copy the whole directory"
        )
    regular_file(path)
    if path.stat().st_size > _METADATA_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size >> 20} MiB; expected at most {_METADATA_LIMIT >> 20}")
    with reading(path):
        data = path.read_bytes()
        asked = globals_asked(io.BytesIO(data))
        trusted = f"convert it with torch's own reader: {_CONVERT} {folder} model.pt"
        refuse_code(path, {name for name in asked if name not in _RECORDS}, trusted)
        root = _Reader(io.BytesIO(data)).load()
        if not isinstance(root, Stored):
            raise ValueError(f"the metadata is a {type(root).__name__}")
        return _arranged(folder, root)


def _is_distributed(folder: Path) -> bool:
    return (folder / ".metadata").exists() or any(folder.glob("*.distcp"))


def _arranged(folder: Path, root: Stored) -> Distributed:
    """Placeholders nested as they were saved, and where their parts are."""
    places = _places(folder, root)
    paths = root.entry("planner_data")
    content: dict[str, Any] = {}
    parts: dict[int, tuple[_Part, ...]] = {}
    claimed = 0
    for name, record in root.entry("state_dict_metadata").items():
        value: Any = None
        if isinstance(record, Bytes):
            value = _step_count(name, places)
        elif isinstance(record, Stored):
            value, found = _placeholder(name, record, places)
            parts[id(value)] = found
            claimed += sum(math.prod(part.sizes) for part in found) * value.dtype.itemsize
        _put(content, paths.get(name, (name,)) if isinstance(paths, dict) else (name,), value)
    held = sum(file.stat().st_size for file in {part.file for found in parts.values() for part in found})
    if claimed > held:
        raise CheckpointError(
            f"{folder / '.metadata'} claims {claimed} bytes of tensors, but the shards have {held}; a shard is cut "
            "short or missing: copy the whole directory again"
        )
    return Distributed(folder, content, parts)


def _places(folder: Path, root: Stored) -> dict[tuple[str, tuple[int, ...] | None], _Part]:
    """(name, offsets or None) -> where that block is stored."""
    places = {}
    sizes: dict[str, int] = {}
    for index, info in root.entry("storage_data").items():
        name, start, length = info.entry("relative_path"), info.entry("offset"), info.entry("length")
        if not isinstance(name, str) or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
            raise CheckpointError(f"{folder / '.metadata'} points outside its directory: {name!r}")
        if isinstance(info.state, dict) and info.state.get("transform_descriptors"):
            raise CheckpointError(
                f"{folder} was saved with {info.state['transform_descriptors']}, which is not read here; convert it: "
                f"{_CONVERT} {folder} model.pt"
            )
        if name not in sizes:
            regular_file(folder / name)
            sizes[name] = (folder / name).stat().st_size
        if not (isinstance(start, int) and isinstance(length, int) and 0 <= start <= start + length <= sizes[name]):
            raise CheckpointError(
                f"{folder / name} has {sizes[name]} bytes, but .metadata looks for some from {start} to "
                f"{start}+{length}; the shard is cut short: copy it again"
            )
        offset = index.state.get("offset") if isinstance(index.state, dict) else None
        key = (index.entry("fqn"), None if offset is None else _sizes(offset))
        places[key] = _Part(key[1] or (), (), folder / name, start, length)
    return places


def _placeholder(
    name: str, record: Stored, places: Mapping[tuple[str, tuple[int, ...] | None], _Part]
) -> tuple[Tensor, tuple[_Part, ...]]:
    shape, dtype = _sizes(record.entry("size")), record.entry("properties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no dtype")
    found = []
    for chunk in record.entry("chunks"):
        offsets, sizes = _sizes(chunk.entry("offsets")), _sizes(chunk.entry("sizes"))
        place = places.get((name, offsets))
        if place is None:
            raise ValueError(f"{name} has a part at {offsets} that is stored nowhere")
        if len(offsets) != len(shape) or any(o + n > d for o, n, d in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name}, {shape}, has a part {sizes} at {offsets}, outside of it")
        if math.prod(sizes) * dtype.itemsize > place.length:
            raise ValueError(f"{name} claims a part {sizes} in {place.length} bytes")
        found.append(_Part(offsets, sizes, place.file, place.start, place.length))
    if sum(math.prod(part.sizes) for part in found) != math.prod(shape):
        raise ValueError(f"the parts of {name} do not add up to {shape}: a rank is missing")
    return torch.empty(shape, dtype=dtype, device="meta"), tuple(found)


def _sizes(value: Any) -> tuple[int, ...]:
    """The numbers of a ``torch.Size``, which the pickle gives as a record of one argument."""
    numbers = value.arguments[0] if isinstance(value, Stored) and value.arguments else value
    if not isinstance(numbers, (tuple, list)) or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
        raise ValueError(f"{numbers!r} is not a shape")
    return tuple(numbers)


def _step_count(name: str, places: Mapping[tuple[str, tuple[int, ...] | None], _Part]) -> Any:
    part = places.get((name, None))
    if part is None or name.rpartition(".")[2] not in STEP_NAMES:
        return None
    return read_part(_bytes_of(part), part.file)


def _bytes_of(part: _Part) -> bytes:
    with part.file.open("rb") as stream:
        stream.seek(part.start)
        return stream.read(part.length)


def _put(content: dict[str, Any], path: Any, value: Any) -> None:
    """Set ``content[a][b]... = value`` for the path ``(a, b, ...)``."""
    keys = list(path) if isinstance(path, (tuple, list)) else [path]
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(f"the entry {key!r} is both a tensor and a dictionary")
    content[keys[-1]] = value
