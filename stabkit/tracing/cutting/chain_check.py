"""The chain of steps held against the model's own VJP, and the samples told apart, in two backward passes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.errors import TraceError
from stabkit.tracing.cutting.samples import Layout, candidates, is_scaled, scale, scales
from stabkit.tracing.flow import engine_vjp
from stabkit.tracing.graph.values import Value, entries_are_finite, meta_of, random_tensors
from stabkit.tracing.products.segments import Segment

_SLACK = 1e3  # multiple of the rounding unit by which orders of addition may differ
_COARSEST = 1e-2  # a tenth of a sample's gradient is no rounding in any dtype


@dataclass(frozen=True)
class Chain:
    """What a random cotangent told on its way from the target to the source.

    Attributes:
        layouts: for every state and every tensor in it, which entries belong to which sample.
        error: relative difference between what the steps and what autograd's engine brought to the source, and to
            every state at which the cotangent was drawn anew; the largest.
        finite: whether what the engine brought to the source is finite; None where the cotangent was drawn anew.
        silent: steps whose Jacobian let nothing through; the cotangent was drawn anew before each of them.
    """

    layouts: tuple[tuple[Layout, ...], ...]
    error: float
    silent: tuple[int, ...]
    finite: bool | None = None


def walk(
    segments: Sequence[Segment], frontiers: Sequence[tuple[Value, ...]], source_layouts: tuple[Layout, ...], seed: int
) -> Chain | None:
    """Pull a random cotangent back through every step; None when samples turn out to influence each other.

    The engine pulls back w, the steps pull back D w, where D multiplies every sample by a power of two of its own. If
    the samples are independent, the second is D times the first at every state, and says which entries belong to
    which sample. So independence is tested, not assumed: batch norm in training mode, or attention across the batch,
    mixes the factors.
    """
    batch, axis = source_layouts[0].batch, source_layouts[0].axis or 0
    options = [candidates(meta_of(value), batch, axis) for value in frontiers[-1]]
    if any(not option for option in options):
        return None
    for attempt in range(max(len(option) for option in options)):
        layouts = tuple(option[min(attempt, len(option) - 1)] for option in options)
        chain = _walk_from(segments, frontiers, source_layouts, layouts, seed)
        if chain is not None:
            return chain
    return None


def _walk_from(
    segments: Sequence[Segment],
    frontiers: Sequence[tuple[Value, ...]],
    source_layouts: tuple[Layout, ...],
    target_layouts: tuple[Layout, ...],
    seed: int,
) -> Chain | None:
    batch, axis = source_layouts[0].batch, source_layouts[0].axis or 0
    dtypes = {dtype for segment in segments for dtype in segment.dtypes()}
    factors, tolerance, reach = scales(batch, seed), _tolerance(dtypes), _range(dtypes)
    layouts, silent, error, whole = [target_layouts], [], 0.0, True
    drawn = random_tensors(frontiers[-1], seed)
    start = len(segments)
    plain = _adjoints(segments, frontiers, start, drawn)
    scaled = _scaled(drawn, target_layouts, factors)
    for index in range(len(segments) - 1, -1, -1):
        scaled = segments[index].vjp(scaled)
        if index not in plain:
            plain = _adjoints(segments, frontiers, start, drawn, start - 2 * (start - index))
        options = [candidates(meta_of(value), batch, axis) for value in frontiers[index]]
        if index == 0:
            options = [[layout] for layout in source_layouts]
        found = _fitting(options, scaled, plain[index], factors, tolerance)
        if found is None:
            return None
        layouts.append(found)
        largest = _largest(scaled)
        if largest == 0:
            silent.append(index)
        if index == 0 or largest <= 1 / reach or reach <= largest < math.inf:
            error = _larger(error, _relative_difference(scaled, _scaled(plain[index], found, factors)))
            if index > 0:
                whole = False
                # nothing flows back through this step (a head initialised at zero), or so little or so much that
                # rounding at the ends of the range of a float would pass for a mixing of samples: start anew before it
                drawn = random_tensors(frontiers[index], seed + index)
                # a new start is soon followed by the next one: to ask for all states at each would cost the square of
                # the depth
                plain = _adjoints(segments, frontiers, index, drawn, index - (start - index))
                start = index
                scaled = _scaled(drawn, found, factors)
    finite = all(map(entries_are_finite, plain[0])) if whole else None
    return Chain(tuple(reversed(layouts)), error, tuple(silent), finite)


def _adjoints(
    segments: Sequence[Segment],
    frontiers: Sequence[tuple[Value, ...]],
    start: int,
    cotangents: list[Tensor],
    lowest: int = 0,
) -> dict[int, list[Tensor]]:
    """What arrives at the states before ``start``, down to the lowest that is wanted, by the engine where it can say.

    The engine gives total derivatives, which at a state of one tensor are those of the chain. At states of several
    they are not, and all steps are walked; the source is the engine's in any case.
    """
    if all(len(frontier) == 1 for frontier in frontiers[:start]):
        wanted = range(max(lowest, 0), start)
        grads = _engine(segments, frontiers, start, [frontiers[index][0] for index in wanted], cotangents)
        return {index: [grad] for index, grad in zip(wanted, grads, strict=True)}
    walked = [cotangents]
    for segment in reversed(segments[:start]):
        walked.append(segment.vjp(walked[-1]))
    return dict(enumerate([_engine(segments, frontiers, start, frontiers[0], cotangents), *walked[-2:0:-1]]))


def _engine(
    segments: Sequence[Segment],
    frontiers: Sequence[tuple[Value, ...]],
    start: int,
    sources: Sequence[Value],
    cotangents: list[Tensor],
) -> list[Tensor]:
    try:
        return engine_vjp(frontiers[start], sources, cotangents)
    except Exception as error:
        for segment in reversed(segments[:start]):  # fails at the same node, and can name it
            cotangents = segment.vjp(cotangents)
        raise TraceError(f"the model's own backward failed: {type(error).__name__}: {error}") from error


def _fitting(
    options: list[list[Layout]],
    scaled: Sequence[Tensor],
    plain: Sequence[Tensor],
    factors: Tensor,
    tolerance: float,
) -> tuple[Layout, ...] | None:
    found = []
    for option, result, reference in zip(options, scaled, plain, strict=True):
        if len(factors) == 1:
            found.append(option[0])  # one sample: there is nothing to tell apart
            continue
        fits = (layout for layout in option if is_scaled(result, reference, layout, factors, tolerance))
        layout = next(fits, None)
        if layout is None:
            return None
        found.append(layout)
    return tuple(found)


def _scaled(tensors: Sequence[Tensor], layouts: Sequence[Layout], factors: Tensor) -> list[Tensor]:
    return [scale(tensor, layout, factors) for tensor, layout in zip(tensors, layouts, strict=True)]


def _tolerance(dtypes: Collection[torch.dtype]) -> float:
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return min(_SLACK * eps, _COARSEST)


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude; nan if there is one."""
    largest = torch.stack([tensor.abs().max().double() for tensor in tensors if tensor.numel()] or [torch.zeros(())])
    return float(largest.max())


def _range(dtypes: Collection[torch.dtype]) -> float:
    """How far from 1 a cotangent may be, up or down, with as much room again for a step to take it further."""
    smallest = max(torch.finfo(dtype).smallest_normal for dtype in dtypes)
    return 1 / math.sqrt(smallest)


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _relative_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    difference = size = 0.0
    compared = False
    for a, b in zip(ours, theirs, strict=True):
        finite = b.isfinite()
        if bool(finite.all()) and not bool(a.isfinite().all()):
            return math.inf
        finite &= a.isfinite()  # which entries a NaN spoils depends on the factors, and says nothing of the steps
        wide = torch.complex128 if a.is_complex() else torch.float64
        compared |= not a.numel() or bool(finite.any())
        x, y = a[finite].to(wide), b[finite].to(wide)
        difference += float((x - y).abs().square().sum())
        size += float(y.abs().square().sum())
    if not compared:
        return math.nan  # nothing is finite on both sides, so nothing was held against each other
    return math.sqrt(difference / size) if size > 0 else math.sqrt(difference)
