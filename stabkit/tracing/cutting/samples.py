"""Which entries of a state belong to which sample of the batch, found by shape and proven by a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.errors import ArgumentError
from stabkit.tracing.graph.values import Meta


@dataclass(frozen=True)
class Layout:
    """How a tensor's entries are shared out among the samples.

    Axis ``axis`` is split into ``batch`` samples: sample-major (``outer``: blocks of consecutive entries) or
    sample-minor. ``axis=None`` means that the whole tensor is one sample.
    """

    batch: int
    axis: int | None
    outer: bool = True

    def columns(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """``(*shape, ...)`` to ``(batch, numel per sample, ...)`` for a tensor with trailing extra dimensions."""
        extra = tensor.shape[len(shape) :]
        if self.axis is None:
            return tensor.reshape(1, -1, *extra)
        moved = self._split(tensor, shape).movedim(self._sample_axis, 0)
        return moved.reshape(self.batch, -1, *extra)

    def tensor(self, columns: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `columns`."""
        extra = columns.shape[2:]
        if self.axis is None:
            return columns.reshape((*shape, *extra))
        split = self._split_shape(shape)
        rest = [size for i, size in enumerate(split) if i != self._sample_axis]
        return columns.reshape(self.batch, *rest, *extra).movedim(0, self._sample_axis).reshape((*shape, *extra))

    def sample_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one sample: the sample axis is dropped, or divided when it holds more than samples."""
        if self.axis is None:
            return tuple(shape)
        left = shape[self.axis] // self.batch
        middle = () if left == 1 else (left,)
        return (*shape[: self.axis], *middle, *shape[self.axis + 1 :])

    @property
    def _sample_axis(self) -> int:
        if self.axis is None:
            raise ArgumentError("the whole tensor is one sample")
        return self.axis if self.outer else self.axis + 1

    def _split_shape(self, shape: Sequence[int]) -> list[int]:
        axis = self.axis or 0
        left = shape[axis] // self.batch
        pair = (self.batch, left) if self.outer else (left, self.batch)
        return [*shape[:axis], *pair, *shape[axis + 1 :]]

    def _split(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor.reshape(*self._split_shape(shape), *tensor.shape[len(shape) :])


def candidates(meta: Meta, batch: int, first: int = 0) -> list[Layout]:
    """Ways in which a tensor could hold ``batch`` samples, the likeliest first."""
    if batch == 1:
        return [Layout(1, None)]
    axes = sorted(range(len(meta.shape)), key=lambda axis: (axis != first, axis))
    exact = [Layout(batch, axis) for axis in axes if meta.shape[axis] == batch]
    larger = [axis for axis in axes if meta.shape[axis] > batch and meta.shape[axis] % batch == 0]
    return [*exact, *(Layout(batch, axis, outer) for axis in larger for outer in (True, False))]


def scales(batch: int, seed: int) -> Tensor:
    """A power of two for every sample, different ones for any two of up to eight.

    Multiplying by a power of two commutes with every rounding, so a linear map that keeps samples apart turns scaled
    samples into equally scaled results, bit for bit; one that does not turns them into something else.
    """
    exponents = torch.arange(batch) % 8
    shuffled = exponents[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))]
    return torch.pow(2.0, shuffled.double())


def scale(tensor: Tensor, layout: Layout, factors: Tensor) -> Tensor:
    """The tensor with every sample multiplied by its factor."""
    if layout.axis is None:
        return tensor * float(factors[0])
    columns = layout.columns(tensor, tensor.shape)
    return layout.tensor(columns * factors.to(device=tensor.device, dtype=columns.dtype).unsqueeze(1), tensor.shape)


def is_scaled(result: Tensor, plain: Tensor, layout: Layout, factors: Tensor, tolerance: float) -> bool:
    """Whether every sample of a result is that of the plain one, times its factor."""
    expected = layout.columns(scale(plain, layout, factors), plain.shape)
    difference = layout.columns(result, result.shape) - expected
    wide = torch.complex128 if plain.is_complex() else torch.float64
    norms: Tensor = torch.linalg.vector_norm(expected.to(wide), dim=1)
    if not bool(norms.isfinite().all()):
        return True  # nothing can be told from numbers that are not finite
    allowed = tolerance * norms.clamp_min(1e-6 * float(norms.max()))
    off: Tensor = torch.linalg.vector_norm(difference.to(wide), dim=1)
    return bool((off <= allowed).all())
