"""Which parts of a step keep sites (tokens, say) apart, told by labels that survive a backward pass bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.tracing.graph.values import Meta, random_tensors
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.products.step_products import Space

_BASE = 8  # powers of two from 1 to 128, which no dtype of a network overflows or rounds


@dataclass(frozen=True)
class Sites:
    """Places that a step may keep apart: an index along one axis of the state, in one sample.

    Attributes:
        batch: number of samples.
        per_sample: places in one sample.
    """

    batch: int
    per_sample: int

    @property
    def count(self) -> int:
        """Places in the whole batch."""
        return self.batch * self.per_sample


def axis_labels(space: Space, axis: int, sites: Sites) -> Tensor:
    """The site ``sample * per_sample + index`` of every entry of a state's only tensor, flat."""
    (meta,), (layout,), (shape,) = space.metas, space.layouts, space.axes
    entries = layout.columns(torch.arange(meta.numel).view(meta.shape), meta.shape)
    index = torch.arange(sites.per_sample).view(-1, *[1] * (len(shape) - axis - 1)).expand(shape).reshape(-1)
    labels = torch.empty(meta.numel, dtype=torch.int64)
    labels[entries] = torch.arange(sites.batch)[:, None] * sites.per_sample + index
    return labels


def possible_labels(meta: Meta, sites: Sites) -> Iterator[Tensor]:
    """Ways in which the axes of a tensor could count the sites, flat; the likeliest first."""
    shape, batch, length = meta.shape, sites.batch, sites.per_sample
    index = [
        torch.arange(size).view(-1, *[1] * (len(shape) - axis - 1)).expand(shape) for axis, size in enumerate(shape)
    ]
    for axis, other in itertools.permutations(range(len(shape)), 2):
        if batch > 1 and (shape[axis], shape[other]) == (batch, length):
            yield (index[axis] * length + index[other]).reshape(-1)
    for axis, size in enumerate(shape):
        if size == sites.count:
            yield index[axis].reshape(-1)
            if batch > 1 and length > 1:
                yield (index[axis] % batch * length + index[axis] // batch).reshape(-1)


def pulled_labels(segment: Segment, labels: Sequence[Tensor], count: int) -> list[Tensor] | None:
    """The site of every entry of the source values, if the segment keeps sites apart; None if it mixes them.

    A random cotangent is pulled back, and again with every site multiplied by a power of two of its own, once for each
    digit of the site's number. Scaling by powers of two commutes with all rounding. So what depends on one site alone
    comes back scaled by just that power, bit for bit, and what mixes several does not.

    Args:
        segment: the nodes.
        labels: sites of the target's entries, one flat tensor for each value.
        count: how many sites there are.

    Returns:
        Labels of the source's entries; -1 where nothing arrives.
    """
    drawn = random_tensors(segment.target, 0)
    plain = segment.vjp(drawn)
    found = [torch.zeros(tensor.numel(), dtype=torch.int64) for tensor in plain]
    for digit in range(max(math.ceil(math.log(count, _BASE)), 1)):
        unit = _BASE**digit
        scaled = [_scaled(tensor, label // unit % _BASE) for tensor, label in zip(drawn, labels, strict=True)]
        for labels_so_far, result, reference in zip(found, segment.vjp(scaled), plain, strict=True):
            exponents = _exponents(result.flatten(), reference.flatten())
            if exponents is None:
                return None
            labels_so_far += unit * exponents
    for label, reference in zip(found, plain, strict=True):
        label[(reference == 0).flatten().cpu()] = -1
        if label.numel() and int(label.max()) >= count:
            return None
    return found


def _scaled(tensor: Tensor, exponents: Tensor) -> Tensor:
    factors = torch.pow(2.0, exponents.double()).to(dtype=tensor.dtype, device=tensor.device)
    return tensor * factors.view(tensor.shape)


def _exponents(result: Tensor, reference: Tensor) -> Tensor | None:
    """The powers of two by which a result is scaled; None if it is scaled by anything else."""
    if result.is_complex() or not bool(reference.isfinite().all()):
        return None
    exponents = (torch.frexp(result).exponent - torch.frexp(reference).exponent) * (reference != 0)
    if bool((exponents < 0).any()) or bool((exponents >= _BASE).any()):
        return None
    if not torch.equal(torch.ldexp(reference, exponents), result):
        return None
    return exponents.long().cpu()


def entries_by_site(labels: Tensor, count: int) -> Tensor | None:
    """The entries of every site, ``(sites, entries of one)``; None unless every site has as many as any other."""
    if labels.numel() % count or bool((labels < 0).any()):
        return None
    if bool((torch.bincount(labels, minlength=count) != labels.numel() // count).any()):
        return None
    return torch.argsort(labels, stable=True).view(count, -1)
