"""One file -> the object saved in it, without running anything the file asks for."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch

from stabkit.checkpoints.mapped import CAN_MAP, read_mapped, tensors_in, written
from stabkit.checkpoints.pickles import globals_asked, refuse_code, stand_ins
from stabkit.checkpoints.programs import kind_of_archive, refusal
from stabkit.errors import CheckpointError, did_you_mean

_MAGIC = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: git lfs pull",
    b"\x89HDF": "is HDF5 (Keras); expected a PyTorch checkpoint or safetensors",
    b"GGUF": "is GGUF; expected a PyTorch checkpoint or safetensors",
    b"<!DOC": "is a web page, probably a failed download; fetch the file again",
    b"<html": "is a web page, probably a failed download; fetch the file again",
    b"\x1f\x8b": "is compressed with gzip: gunzip it first",
}
_DATA_PICKLE_LIMIT = 2**29
_SMALL = 2**16  # bytes of tensors that are read at once: counts of steps, settings
_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # opens torch.save's format before 1.6


@dataclass(frozen=True)
class SavedObject:
    """The object in a file.

    Attributes:
        content: usually a dictionary.
        how: the format, in words.
        written: what tells that the file was written to since then.
    """

    content: Any
    how: str
    written: tuple[int, int] = (0, 0)


def read_file(path: Path, *, trust_pickle: bool = False, mapped: bool = False) -> SavedObject:
    """Read a checkpoint file: safetensors, or what ``torch.save`` writes, today's format or the legacy one.

    Nothing in the file is executed unless
    ``trust_pickle`` is given. ``argparse.Namespace`` and numpy values are read as inert stand-ins.

    Args:
        path: the file.
        trust_pickle: unpickle whatever the file holds, which runs any code it asks for.
        mapped: leave large tensors memory-mapped, of which not all are needed; `read_mapped` reads those that are.

    Raises:
        CheckpointError: the file is missing, cut short while it is read, damaged, of another kind, or asks for
            code to be run.
    """
    regular_file(path)
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on protocols and storages of old files, on escapes in damaged ones
        before = written(path)
        found = _read(path, trust_pickle)
        read_mapped(path, tensors_in(found.content), before=before, up_to=_SMALL if mapped else None)
    return replace(found, written=before)


def _read(path: Path, trust_pickle: bool) -> SavedObject:
    with path.open("rb") as file:
        head = file.read(64)
    for magic, message in _MAGIC.items():
        if head.lower().startswith(magic.lower()):
            raise CheckpointError(f"{path} {message}")
    if path.suffix.lower() == ".safetensors" or _looks_like_safetensors(path, head):
        return SavedObject(safetensors.torch.load_file(path), "safetensors")
    if head.startswith(b"PK"):
        return _read_zip(path, trust_pickle)
    return _read_legacy(path, trust_pickle)


def regular_file(path: Path) -> None:
    """Check that ``path`` is a file with something in it.

    Raises:
        CheckpointError: it is missing, empty, a directory, or a device or pipe that could block.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        folder = path.parent
        names: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            names = os.listdir(folder)
        hint = did_you_mean(path.name, names) if names else f" ({folder} is not there or is empty)"
        if not path.suffix and path.name == str(path):
            hint += f"; a model name says where it comes from: torchvision:{path.name} or timm:{path.name}"
        raise CheckpointError(f"no file {path}{hint}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file; expected a checkpoint file")
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty; save or copy it again")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes the readers raise becomes one message."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}. Save or copy it again") from error
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes the unpicklers raise anything; it is never tried another way
        # torch's own text advises to load without its safety; what follows this mark is the reason
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = said.partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint, it is damaged, cut short or of another kind: {reason}. "
            "Save or copy it again"
        ) from error


def _looks_like_safetensors(path: Path, head: bytes) -> bool:
    if len(head) < 10 or head[8:9] != b"{":
        return False
    return 8 + int.from_bytes(head[:8], "little") <= path.stat().st_size


def _read_zip(path: Path, trust_pickle: bool) -> SavedObject:
    with path.open("rb") as stream:
        check_archive(stream, path.stat().st_size, path, trust_pickle=trust_pickle)
    content = _load(path, trust_pickle, mmap=CAN_MAP)
    return SavedObject(content, "torch.save" + _trusted(trust_pickle))


def check_archive(stream: IO[bytes], size: int, path: Path, *, trust_pickle: bool = False) -> None:
    """Check that a zip is one that ``torch.save`` wrote and, unless it is trusted, that it asks for no code.

    Args:
        stream: the zip.
        size: its length in bytes.
        path: what messages call it.
        trust_pickle: leave the pickle inside unchecked.

    Raises:
        CheckpointError: it is another kind of zip, is forged, or asks for code to be run.
    """
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2] or entry.filename for entry in entries]
        _refuse_other_archives(path, names)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(
                f"{path} is a compressed zip, which torch.save never writes: unpack it and pack it again with zip -0"
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise CheckpointError(f"{path} holds two entries of one name, which torch.save never writes")
        if sum(entry.file_size for entry in entries) > size:
            raise CheckpointError(f"{path} claims more data than it has; it is damaged or forged")
        record = next(e for e, name in zip(entries, names, strict=True) if name == "data.pkl")
        if record.file_size > _DATA_PICKLE_LIMIT:
            raise CheckpointError(
                f"{path} has a pickle of {record.file_size >> 20} MiB beside its tensors; save the state dict alone"
            )
        if not trust_pickle:
            with archive.open(record) as pickled:
                refuse_code(path, globals_asked(pickled))


def read_part(data: bytes, path: Path) -> Any:
    """What ``torch.save`` wrote as one part of a larger file, with the same care as :func:`read_file`.

    Raises:
        CheckpointError: the part is damaged or asks for code to be run.
    """
    with reading(path):
        if not data.startswith(b"PK"):
            raise CheckpointError(f"{path} has a part that torch.save did not write; it is damaged")
        check_archive(io.BytesIO(data), len(data), path)
        return _load(io.BytesIO(data), trust_pickle=False, mmap=False)


def _read_legacy(path: Path, trust_pickle: bool) -> SavedObject:
    with path.open("rb") as stream:
        first = stream.read(1)
        stream.seek(257)
        if stream.read(5) == b"ustar":
            raise CheckpointError(f"{path} is a tar archive; load it with the torch that wrote it and save it again")
        if first != b"\x80":
            raise CheckpointError(
                f"{path} is not a checkpoint: expected .safetensors or what torch.save writes (a zip or a pickle)"
            )
        stream.seek(0)
        if not trust_pickle:
            refuse_code(path, globals_asked(stream))
            stream.seek(0)
            if _LEGACY_MAGIC not in stream.read(32):
                raise CheckpointError(
                    f"{path} is a plain pickle, not what torch.save writes; save the state dict with torch.save"
                )
            stream.seek(0)
            refuse_code(path, globals_asked(stream, pickles=5))
    content = _load(path, trust_pickle, mmap=False)
    return SavedObject(content, "torch.save, legacy format" + _trusted(trust_pickle))


def _refuse_other_archives(path: Path, names: list[str]) -> None:
    kind = kind_of_archive(names)
    if kind is not None:
        raise refusal(path, kind)
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip without a checkpoint of its own; it holds {', '.join(names[:5]) or 'nothing'}. "
            "Unpack it and give the file inside"
        )


def _load(path: Path | IO[bytes], trust_pickle: bool, mmap: bool) -> Any:
    if trust_pickle:
        return torch.load(path, weights_only=False, mmap=mmap, map_location="cpu")
    with torch.serialization.safe_globals([(inert, name) for name, inert in stand_ins().items()]):
        return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")


def _trusted(trust_pickle: bool) -> str:
    return ", unpickled with its code (--trust-pickle)" if trust_pickle else ""
