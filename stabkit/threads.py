"""One thread for small matrices and tensors, where more threads wait for one another longer than they work."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SMALL = 512  # rows up to which LAPACK gains nothing from a second thread
_SMALL_BATCH = 2**15  # numbers up to which torch itself does not divide an elementwise operation
_active = False


@contextmanager
def single_threaded(size: int) -> Iterator[None]:
    """Decompose matrices of up to ``size`` rows with one BLAS thread of numpy and scipy where they are small.

    Afterwards every library has as many threads as before. torch's own threads stay as they are.

    Args:
        size: rows of the largest matrix.

    Example:
        >>> import numpy as np
        >>> with single_threaded(3):
        ...     values = np.linalg.eigvalsh(np.eye(3))
        >>> values.tolist()
        [1.0, 1.0, 1.0]
    """
    global _active
    if _active or size > SMALL:
        yield
        return
    _active = True
    try:
        with _libraries().limit(limits=1):
            yield
    finally:
        _active = False


@contextmanager
def torch_threads(numbers: int) -> Iterator[None]:
    """Let torch use one thread while states of up to ``numbers`` numbers are worked on, where that is few.

    Many vectors at once make such states just large enough for torch to divide the work, and too small to gain by it.

    Args:
        numbers: in the largest state of the whole batch.
    """
    before = torch.get_num_threads()
    if before == 1 or numbers > _SMALL_BATCH:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _libraries() -> Any:
    import scipy.linalg  # noqa: F401  # a library that is not loaded yet could not be limited
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController()
    return found.select(filepath=[one["filepath"] for one in found.info() if _is_of_numpy_or_scipy(one)])


def _is_of_numpy_or_scipy(library: dict[str, Any]) -> bool:
    """Whether a library is the BLAS of numpy or scipy, and not one that came with torch."""
    return library["user_api"] == "blas" and "torch" not in library["filepath"]
