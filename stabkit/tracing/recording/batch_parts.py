"""Some of the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabkit.errors import TraceError
from stabkit.tracing.recording.containers import map_tensors, named_tensors


@dataclass(frozen=True)
class Call:
    """What a model is called with.

    Attributes:
        inputs: positional arguments.
        kwargs: keyword arguments.
        batch_dim: which dimension of the tensors counts samples; None when the batch is one whole.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_dim: int | None

    @property
    def samples(self) -> int:
        """How many samples it holds: what the first tensor with that dimension says; 1 for a whole."""
        if self.batch_dim is None:
            return 1
        shaped = [
            tensor for _, tensor in named_tensors([self.inputs, dict(self.kwargs)]) if _has(tensor, self.batch_dim)
        ]
        return int(shaped[0].shape[self.batch_dim]) if shaped else 1

    def part(self, low: int, high: int) -> Call:
        """The call with samples ``low`` to ``high``; tensors that do not count samples stay whole.

        Example:
            >>> import torch
            >>> call = Call((torch.arange(6.0).view(3, 2), torch.ones(5)), {}, 0)
            >>> [tensor.tolist() for tensor in call.part(1, 2).inputs]
            [[[2.0, 3.0]], [1.0, 1.0, 1.0, 1.0, 1.0]]
        """
        count, dim = self.samples, self.batch_dim
        if count == 0:
            raise TraceError("the input holds no samples; give at least one")
        if dim is None or (low, high) == (0, count):
            return self

        def cut(tensor: Tensor) -> Tensor:
            counts = _has(tensor, dim) and tensor.shape[dim] == count
            return tensor.narrow(dim, low, high - low) if counts else tensor

        inputs, kwargs = map_tensors([self.inputs, dict(self.kwargs)], cut)
        return Call(inputs, kwargs, dim)


def _has(tensor: Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()
