"""Tests run one thread each: on small matrices the threads of LAPACK cost more than they save, and runs are parallel.

The package pins nothing; what users' own threads cost is measured in tests/benchmarks.

What collection made, the libraries among it, stays until the end: a million objects, which every full garbage
collection would look at again, in most of a second. They are kept out of it; what tests make is collected as ever.

The zoo of models runs as a whole with ``-m zoo``; without a marker only its fast subset runs, of whatever folder.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import hypothesis  # noqa: E402, F401  # before anything is kept: it refuses generators that nobody is seen to hold
import pytest  # noqa: E402
import torch  # noqa: E402  # the libraries read these when they are loaded

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for = "zoo" in config.option.markexpr or config.option.keyword or any("::" in arg for arg in config.args)
    if asked_for:
        return
    slow = [item for item in items if item.get_closest_marker("zoo")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
