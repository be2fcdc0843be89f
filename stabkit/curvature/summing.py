"""Several processes that share the batches of a loss: sums over all of them, and refusals that all of them hear of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stabkit.errors import TraceError


class Summing(Protocol):
    """Several processes that share the batches, or this one alone."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def count(self) -> int:
        """How many there are."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all of them, in its place; every one must ask for it."""


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    count: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


ALONE = _Alone()


@contextlib.contextmanager
def agreed(ranks: Summing) -> Iterator[None]:
    """Work of one process that may fail: where it does in one, it fails in all, and none waits for the others' sums.

    Every process must come here as often as the others, and nothing inside may ask for a sum.

    Raises:
        TraceError: it failed in another process.
    """
    try:
        yield
    except Exception:
        _failed(ranks, here=True)
        raise
    elsewhere = _failed(ranks, here=False)
    if elsewhere:
        raise TraceError(
            f"the loss was refused in {elsewhere} of the {ranks.count} processes that share the batches; what was "
            "wrong is told there"
        )


def _failed(ranks: Summing, *, here: bool) -> int:
    if ranks.count == 1:
        return int(here)
    return int(ranks.sum(torch.tensor(float(here), dtype=torch.float64)))
