"""What a stored tensor is, read from its name and shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|tok_emb|pos_emb|lookup)|token_type|position_ids", re.IGNORECASE)
_RECURRENT = re.compile(r"weight_hh|recurrent|(^|[._])(hh|h2h|hidden_to_hidden)([._]|$)", re.IGNORECASE)
_GATES = {1: ("hidden",), 3: ("reset", "update", "new"), 4: ("input", "forget", "cell", "output")}


@dataclass(frozen=True)
class Role:
    """How a tensor acts as a matrix.

    Attributes:
        kind: ``"matrix"``, ``"convolution"``, ``"recurrent"`` or ``"embedding"``.
        transposed: the first dimension is the input's, as in the ``Conv1D`` of GPT-2.
        fan_in: numbers that each output sums over.
        gates: names of the square blocks of a recurrent matrix.
        notes: what was assumed.
    """

    kind: str
    transposed: bool
    fan_in: int
    gates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def role_of(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Role | None:
    """The role of a tensor, or None for vectors, scalars and whatever is no floating-point weight.

    Args:
        name: its name.
        tensor: the tensor; only its shape and dtype are used.
        shapes: shapes of all tensors, for the bias beside this one.

    Example:
        >>> import torch
        >>> role_of("rnn.weight_hh_l0", torch.ones(12, 4), {}).gates
        ('reset', 'update', 'new')
    """
    if tensor.dim() < 2 or tensor.dim() > 5 or not tensor.is_floating_point() or 0 in tensor.shape:
        return None
    rows, rest = int(tensor.shape[0]), math.prod(tensor.shape[1:])
    if tensor.dim() > 2:
        if rows == 1:
            return None  # a position table or a class token, with a batch of one
        return Role("convolution", False, rest, notes=("singular values are those of the kernel as a matrix",))
    if _EMBEDDING.search(name):
        return Role("embedding", False, 1, notes=("a table: its rows are looked up, not multiplied",))
    if _RECURRENT.search(name) and rows % rest == 0 and rows // rest in _GATES:
        return Role("recurrent", False, rest, _GATES[rows // rest])
    bias = shapes.get(re.sub(r"weight(?=[^.]*$)", "bias", name), ())
    if name.endswith("weight") and rows != rest and bias == (rest,):
        return Role("matrix", True, rows, notes=("stored as inputs x outputs, as its bias shows",))
    return Role("matrix", False, rest)
