"""Which flat coordinates of a state belong to a token, a channel, or any other index along an axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabkit.errors import OutOfRangeError
from stabkit.operators.indices import Index, checked_index
from stabkit.tracing.flow import State


def coordinates(state: State, *, dim: int, index: Index, tensor: int = 0) -> Tensor:
    """The flat coordinates of one sample of a state whose index along a dimension is one of those given.

    Args:
        state: the state that the rows (``step.target``) or the columns (``step.source``) run through.
        dim: a dimension of one sample of the tensor (``state.sample_shapes``), best counted from the end: -2 for the
            tokens of ``(tokens, channels)``, -3 for the channels of ``(channels, height, width)``. A batch of one is
            one sample, and keeps its axis.
        index: one index, several, or a slice.
        tensor: which tensor of the state.

    Returns:
        Coordinates in ascending order of memory, as `Jacobian.restrict` takes them.

    Raises:
        OutOfRangeError: the state has no such tensor, dimension or index.

    Example:
        >>> import torch, stabkit
        >>> step = stabkit.trace(torch.nn.LayerNorm(3), torch.randn(1, 2, 3)).steps[0]
        >>> coordinates(step.source, dim=-2, index=1).tolist()  # the second of two tokens
        [3, 4, 5]
        >>> token = step.jacobian().restrict(rows=coordinates(step.target, dim=-2, index=1))
        >>> token.shape
        (1, 3, 6)
    """
    shapes = state.space.axes
    if not -len(shapes) <= tensor < len(shapes):
        raise OutOfRangeError(f"tensor={tensor}, but the state has {len(shapes)} tensors, of shapes {list(shapes)}")
    tensor %= len(shapes)
    shape = shapes[tensor]
    real = len(state.sample_shapes[tensor])  # complex numbers bring one axis more
    if not -real <= dim < real:
        raise OutOfRangeError(f"dim={dim}, but one sample of the tensor has shape {state.sample_shapes[tensor]}")
    dim %= real
    chosen = checked_index([index] if isinstance(index, int) else index, shape[dim], "index", torch.device("cpu"))
    start = sum(math.prod(s) for s in shapes[:tensor])
    numbered = torch.arange(start, start + math.prod(shape)).view(shape)
    return numbered.index_select(dim, chosen).flatten()
