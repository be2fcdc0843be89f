"""How much memory there is, and large results in pages of their own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import ArgumentError

_LARGE = 2**22  # bytes from which numpy asks for huge pages
_KEPT = 31 * 2**20  # bytes; the largest block after whose release glibc keeps freed memory


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    limits = [int(found[0]) * 1024] if found else []
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        limits.append(max(int(limit) - int(used), 0))
    return min(limits, default=None)


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.exists() else ""


def budget(memory: int | None, device: torch.device) -> int | None:
    """The bytes that may be used: those given, or four fifths of what is available.

    Raises:
        ArgumentError: ``memory`` is not a positive number of bytes.
    """
    if memory is None:
        free = available(device)
        return None if free is None else free * 4 // 5
    if not memory > 0:
        raise ArgumentError(f"memory={memory}; expected a positive number of bytes, e.g. memory=2 * 2**30")
    return int(memory)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros.

    A large one on the CPU comes from numpy, which asks for huge pages and leaves the zeros to the system: the first
    write to fresh memory costs a fault for every page, a tenth of the time of a dense Jacobian of a convolution.
    """
    bytes_needed = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or bytes_needed < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(bytes_needed, dtype=np.uint8)).view(dtype).view(shape)


def keep_workspace() -> None:
    """Let the allocator of the C library keep what is freed between products.

    glibc hands freed memory back to the system above a threshold that grows with the largest block freed so far, and
    every product then faults its workspace in again; this was a third of the time of a dense Jacobian.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


def readable(n_bytes: float) -> str:
    """``"1.5 GiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} GiB"
