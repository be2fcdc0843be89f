"""How fast this machine multiplies matrices and reads memory, measured in under two seconds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stabkit.results import Result

_ROUNDS = 5
_SIDE = 1024  # of the matrices multiplied; 2 GFLOP
_STREAM = 2**26  # bytes read, far more than caches hold


@dataclass(frozen=True)
class Machine(Result):
    """Rates of one device, medians over a few rounds.

    Attributes:
        device: which.
        threads: that torch uses on it.
        flops: floating-point operations per second of a matrix product in float32.
        bandwidth: bytes per second read from memory.
        load: the load of the machine while it was measured, processes per core; 0 where the system does not say.
    """

    device: str
    threads: int
    flops: float
    bandwidth: float
    load: float


def calibrate(device: torch.device | str = "cpu") -> Machine:
    """Measure a device; takes well under two seconds.

    Example:
        >>> machine = calibrate()
        >>> machine.flops > 1e8 and machine.bandwidth > 1e8
        True
    """
    device = torch.device(device)
    A = torch.ones(_SIDE, _SIDE, device=device)
    column = torch.ones(_STREAM // 4, device=device)
    product = _median(lambda: A @ A, device)
    read = _median(lambda: column.sum(), device)
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    return Machine(str(device), torch.get_num_threads(), 2 * _SIDE**3 / product, _STREAM / read, load)


def _median(work: Callable[[], Any], device: torch.device) -> float:
    work()
    return statistics.median(timed(work, device)[1] for _ in range(_ROUNDS))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of some work, and the seconds that it took.

    With one thread on a CPU these are seconds of the processor: neighbours that load the machine do not count.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _wait(device)
    began = clock()
    result = work()
    _wait(device)
    return result, clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory in use inside a ``with`` block, in bytes, with what was in use before it.

    On a CPU it is the resident set of the process, whose high-water mark Linux lets a process reset; None elsewhere.

    Attributes:
        most: bytes; None where they cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most: int | None = None
        self._resettable = False

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._resettable = _reset_high_water()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device)
        elif self._resettable:
            self.most = _status("VmHWM")


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0)
