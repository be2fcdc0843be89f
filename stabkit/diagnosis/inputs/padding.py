"""Padding as the data show it: one value that fills the ends of sequences of different lengths and occurs nowhere else.

No name of an argument and no convention is asked: what is padding is read off the tensors that a model is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEEN = 2  # positions in a row that a filled end has at least, somewhere
_FILLED = 4  # positions that are filled up in all at least: fewer may end alike by chance
_FEWEST = 3  # positions that a sequence has at least


def padded(tensor: Tensor, axis: int = 1) -> Tensor | None:
    """Which positions of tokens (samples, positions), or vectors (samples, positions, features), are filled up.

    Args:
        tensor: tokens, or a mask of zeros and ones, or vectors, of which those of zeros alone count.
        axis: along which positions lie; samples lie along the other of the first two.

    Returns:
        Of shape (samples, positions), True where it is padding; None where none is seen.

    Example:
        >>> padded(torch.tensor([[5, 2, 7, 4], [3, 0, 0, 0], [6, 4, 2, 0]])).sum(1)
        tensor([0, 3, 1])
        >>> padded(torch.tensor([[5, 2, 7, 4], [3, 8, 1, 6]])) is None
        True
    """
    if tensor.dim() not in (2, 3) or tensor.layout != torch.strided or tensor.is_complex():
        return None
    if tensor.dim() == 2 and tensor.is_floating_point() and not bool(((tensor == 0) | (tensor == 1)).all()):
        return None  # features of samples
    tokens = tensor if tensor.dim() == 2 else (tensor == 0).all(dim=2)
    tokens = tokens.detach() if axis == 1 else tokens.detach().T
    if tokens.shape[0] < 2 or tokens.shape[1] < _FEWEST:
        return None
    right = _filled(tokens, tensor.dim() == 3)
    if right is not None:
        return right
    left = _filled(tokens.flip(1), tensor.dim() == 3)
    return None if left is None else left.flip(1)


def _filled(tokens: Tensor, zeros: bool) -> Tensor | None:
    for value in (True,) if zeros else dict.fromkeys(tokens[:, -1].tolist()):
        same = tokens == value
        ends = same.flip(1).cumprod(1).flip(1).bool()
        lengths = ends.sum(1)
        longest = int(lengths.max())
        if longest < _SEEN or longest == tokens.shape[1] or int(lengths.min()) == longest:
            continue
        if bool((same == ends).all()) and int(lengths.sum()) >= _FILLED:
            return ends
    return None


def padding_of(tensor: Tensor) -> Tensor | None:
    """What `padded` sees of tokens and vectors along the second axis; of a mask nobody knows which end is filled up.

    Example:
        >>> padding_of(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])) is None
        True
    """
    if tensor.layout != torch.strided or tensor.is_complex() or not tensor.numel():
        return None
    if tensor.dim() == 2 and (tensor.dtype == torch.bool or not float(tensor.max()) - float(tensor.min()) >= 2):
        return None
    return padded(tensor)


def is_time_along(tensor: Tensor, axis: int) -> bool:
    """Whether sequences end, filled up, along one of the first two axes and not along the other.

    Example:
        >>> tokens = torch.tensor([[5, 2, 7, 4], [3, 0, 0, 0], [6, 4, 2, 0]])
        >>> is_time_along(tokens, 1), is_time_along(tokens, 0)
        (True, False)
    """
    return padded(tensor, axis) is not None and padded(tensor, 1 - axis) is None
