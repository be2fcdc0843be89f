"""Tensors that are mapped from a file -> tensors in memory, read in a way that a file cut short cannot kill.

A page of a mapped file that is no longer there ends the process with SIGBUS, at whatever moment it is looked at;
``torch.save`` onto a checkpoint that is being analysed is enough. To read the same bytes is an error instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabkit.errors import CheckpointError

_MAPS = Path("/proc/self/maps")
#: whether it can be told which tensors are mapped; where it cannot, nothing is mapped in the first place
CAN_MAP = _MAPS.exists()


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
        elif isinstance(item, torch.nn.Module):
            yield from item.parameters()
            yield from item.buffers()


def written(path: Path | int) -> tuple[int, int]:
    """What tells that a file, or an open one, was written to."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def read_mapped(
    path: Path, tensors: Iterable[Tensor], *, before: tuple[int, int] | None = None, up_to: int | None = None
) -> None:
    """Give the tensors among some that are mapped from a file memory of their own, in place.

    Args:
        path: the file.
        tensors: any; those that share memory do so afterwards.
        before: what `written` told when the file was mapped.
        up_to: the most bytes of what is read; larger ones stay mapped.

    Raises:
        CheckpointError: the file was cut short or written to since it was mapped.
    """
    kept = {id(t): t for t in tensors if t.layout == torch.strided and not (t.is_meta or t.is_quantized)}
    if not (kept and CAN_MAP):
        return
    with path.open("rb") as stream:
        places = list(_mappings(path, os.fstat(stream.fileno())))
        read: dict[int, torch.UntypedStorage] = {}
        for tensor in kept.values():
            held = tensor.untyped_storage()
            address, size = held.data_ptr(), held.nbytes()
            found = next((at - start + address for start, end, at in places if start <= address < end), None)
            if found is None or not size or (up_to is not None and size > up_to):
                continue
            if held._cdata not in read:
                read[held._cdata] = _read(path, stream.fileno(), found, size)
            with torch.no_grad():
                memory = torch.empty(0, dtype=tensor.dtype).set_(
                    read[held._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()
                )
                tensor.data = memory
        if read and before is not None and written(stream.fileno()) != before:
            raise _cut_short(path)


def _mappings(path: Path, status: os.stat_result) -> Iterator[tuple[int, int, int]]:
    """Where a file is mapped: first address, the one behind the last, and the place of the first in the file."""
    real = os.path.realpath(path)
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        addresses, _, at, device, inode, *name = line.split(maxsplit=5)
        major, _, minor = device.partition(":")
        same = int(inode) == status.st_ino and os.makedev(int(major, 16), int(minor, 16)) == status.st_dev
        if same or name == [real]:  # layered file systems give a mapping the numbers of a lower layer
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16), int(at, 16)


def _read(path: Path, file: int, at: int, size: int) -> torch.UntypedStorage:
    memory = torch.empty(size, dtype=torch.uint8)
    buffer = memoryview(memory.numpy())  # type: ignore[arg-type]
    done = 0
    while done < size:
        count = os.preadv(file, [buffer[done : done + 2**30]], at + done)
        if count == 0:
            raise _cut_short(path)
        done += count
    return memory.untyped_storage()


def _cut_short(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} was cut short or written anew while it was read; give a copy of it")
