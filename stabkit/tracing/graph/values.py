"""Values of a recorded forward pass: outputs of autograd nodes, versioned against in-place writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from stabkit.vocabulary import operation as operation

_KEPT = "stabkit.metas"  # among the metadata of a node
_REMEMBERED = 1 << 16  # numbers of a random tensor that is kept for the next who asks for it
_LONG = 4096  # entries; the deviation of one estimate is about the root of two over their number


class Value(NamedTuple):
    """One output of one autograd node.

    The pair names a tensor *at one version*: an in-place operation makes a new node, so the values before and
    after the write are two different ones although they share their storage.
    """

    node: Node
    output: int

    @property
    def edge(self) -> GradientEdge:
        """The same value as ``torch.autograd.grad`` takes it."""
        return GradientEdge(self.node, self.output)


class Meta(NamedTuple):
    """Shape, dtype and device of a value, known without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def numbers(self) -> int:
        """How many real numbers: half of a spectrum holds as many as the real values that it is made of."""
        return self.numel * (2 if self.dtype.is_complex else 1)


def value_of(tensor: Tensor) -> Value:
    """The value that a tensor holds now; the tensor must require grad."""
    if tensor.grad_fn is not None:
        return Value(tensor.grad_fn, tensor.output_nr)
    edge = get_gradient_edge(tensor)
    return Value(edge.node, edge.output_nr)


def meta_of(value: Value) -> Meta:
    """Shape, dtype and device of a value, as autograd recorded them."""
    return metas_of(value.node)[value.output]


def outputs_of(node: Node) -> list[Value]:
    """The values that an operation makes."""
    count = len(metas_of(node))
    return [Value(node, 0)] if count == 1 else [Value(node, output) for output in range(count)]


def metas_of(node: Any) -> tuple[Meta, ...]:
    """Shape, dtype and device of the values that an operation makes."""
    # a reader asks thousands of times, and autograd makes them anew each time: the node keeps them
    kept: dict[str, tuple[Meta, ...]] = node.metadata
    metas = kept.get(_KEPT)
    if metas is None:
        entries = getattr(node, "_input_metadata", None)
        # an AccumulateGrad node has none
        entries = [node.variable] if entries is None else entries
        metas = kept[_KEPT] = tuple(Meta(tuple(entry.shape), entry.dtype, entry.device) for entry in entries)
    return metas


def probes_of(numel: int) -> int:
    """How many random vectors of some length estimate a sum over all directions to a few percent: two, or one long."""
    return 1 if numel >= _LONG else 2


def standard_normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers on the CPU, from a generator of this seed, as `normal_from` draws; not to be written to.

    Example:
        >>> standard_normal((2, 3), 0).dtype, standard_normal((2, 2**16), 0).dtype
        (torch.float64, torch.float32)
    """
    small = math.prod(shape) <= _REMEMBERED
    return _remembered(tuple(shape), seed) if small else _normal(tuple(shape), seed)


def normal_from(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers on the CPU in float64, and in float32 where there are many: a quarter of the time.

    Any vector is as good as another in a random direction, in whatever digits it was drawn.
    """
    dtype = torch.float64 if math.prod(shape) <= _REMEMBERED else torch.float32
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return normal_from(torch.Generator().manual_seed(seed), shape)


# the same few vectors meet every step of a model, and to draw one takes as long as some products with it
_remembered = lru_cache(maxsize=64)(_normal)


def entries_are_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite.

    One of them spoils the sum, which is had in a tenth of the time; the entries are looked at where it overflowed.

    Example:
        >>> entries_are_finite(torch.tensor([1.0, 2.0])), entries_are_finite(torch.tensor([1.0, math.inf, -math.inf]))
        (True, False)
        >>> entries_are_finite(torch.full((2,), 3e38))
        True
    """
    entries = tensor.detach()
    return bool(entries.sum().isfinite()) or bool(entries.isfinite().all())


def random_tensors(values: Sequence[Value], seed: int) -> list[Tensor]:
    """Standard normal tensors of the shapes of some values; the same on every device."""
    return random_of([meta_of(value) for value in values], seed)


def random_of(metas: Sequence[Meta], seed: int) -> list[Tensor]:
    """Standard normal tensors of some shapes and dtypes; the same on every device."""
    if len(metas) == 1 and not metas[0].dtype.is_complex:
        return [standard_normal(metas[0].shape, seed).to(dtype=metas[0].dtype, device=metas[0].device, copy=True)]
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape, dtype, device in metas:
        drawn = normal_from(generator, shape)
        if dtype.is_complex:
            drawn = torch.complex(drawn, normal_from(generator, shape))
        tensors.append(drawn.to(dtype=dtype, device=device))
    return tensors
