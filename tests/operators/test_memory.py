from __future__ import annotations

import pytest
import torch

from stabkit.operators import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(2, 3), (3, 1024, 1024)])
def test_zeros_are_zeros_of_any_size_and_dtype(dtype, shape):
    made = memory.zeros(shape, dtype, CPU)
    assert made.shape == shape
    assert made.dtype == dtype
    assert not made.any()
    made += 1
    assert bool((made == 1).all())


def test_the_budget_is_what_is_given_or_most_of_what_is_free(monkeypatch):
    assert memory.budget(1000, CPU) == 1000
    monkeypatch.setattr(memory, "available", lambda _: 1000)
    assert memory.budget(None, CPU) == 800
    monkeypatch.setattr(memory, "available", lambda _: None)
    assert memory.budget(None, CPU) is None
    with pytest.raises(ValueError, match="memory=-1; expected a positive number of bytes"):
        memory.budget(-1, CPU)


def test_free_memory_is_the_least_that_anybody_grants(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 7 kB\n"}
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert memory.available(CPU) == 7 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "3000\n"}
    assert memory.available(CPU) == 2000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.available(CPU) == 7 * 1024
    files.clear()
    assert memory.available(CPU) is None


def test_sizes_are_readable():
    assert [memory.readable(n) for n in (12, 3 * 2**10, 2.5 * 2**20, 40 * 2**30)] == [
        "12 bytes",
        "3 KiB",
        "2.5 MiB",
        "40 GiB",
    ]
