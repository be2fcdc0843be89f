"""Which flat coordinates are chosen by an index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stabkit.errors import ArgumentError, OutOfRangeError

Index = Tensor | Sequence[int] | slice | int


def checked_index(index: Index | None, size: int, name: str, device: torch.device) -> Tensor:
    """An index as a tensor of distinct numbers from 0 to ``size - 1``.

    Raises:
        OutOfRangeError: a number is out of range, or no integer.
        ArgumentError: there is none, or one comes twice.
    """
    everything = torch.arange(size, device=device)
    if index is None:
        return everything
    if isinstance(index, slice):
        chosen = everything[index]
    else:
        chosen = torch.as_tensor([index] if isinstance(index, int) else index, device=device)
        if chosen.dtype == torch.bool and tuple(chosen.shape) == (size,):
            chosen = everything[chosen]
    if chosen.numel() == 0:
        raise ArgumentError(f"{name} names no coordinate; expected some of 0 to {size - 1}")
    if chosen.dim() != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise OutOfRangeError(
            f"{name} has shape {tuple(chosen.shape)} and dtype {chosen.dtype}; expected integers, one after the other"
        )
    if int(chosen.min()) < -size or int(chosen.max()) >= size:
        raise OutOfRangeError(
            f"{name} reaches from {int(chosen.min())} to {int(chosen.max())}; expected 0 to {size - 1}"
        )
    chosen = chosen % size
    if len(torch.unique(chosen)) != len(chosen):
        raise ArgumentError(f"{name} names a coordinate twice; expected distinct ones")
    return chosen
