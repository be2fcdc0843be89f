"""The chain of steps checked against the model's own VJP, and the samples told apart, in one backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.tracing.flow import engine_vjp
from stabkit.tracing.samples import Layout, candidates, leaks, one_sample
from stabkit.tracing.segments import Segment
from stabkit.tracing.values import Value, meta_of, random_tensors


@dataclass(frozen=True)
class Chain:
    """What a random cotangent told on its way from the target to the source.

    Attributes:
        layouts: for every state and every tensor in it, which entries belong to which sample.
        cotangents: what arrived at the source.
        restart: the state at which the cotangent was last drawn; later ones pass nothing back.
        restart_cotangents: what was drawn there.
        silent: steps whose Jacobian let nothing through.
    """

    layouts: tuple[tuple[Layout, ...], ...]
    cotangents: tuple[Tensor, ...]
    restart: int
    restart_cotangents: tuple[Tensor, ...]
    silent: tuple[int, ...]


def walk(
    segments: Sequence[Segment], frontiers: Sequence[tuple[Value, ...]], source_layouts: tuple[Layout, ...], seed: int
) -> Chain | None:
    """Pull a random cotangent of the first sample back through every step; None when it reaches other samples.

    Whether samples are independent is thus tested, not assumed: batch norm in training mode, or attention across
    the batch, lets the cotangent of one sample reach the others.
    """
    batch = source_layouts[0].batch
    target = frontiers[-1]
    axis = source_layouts[0].axis or 0
    options = [candidates(meta_of(value), batch, axis) for value in target]
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
    cotangents = _draw(frontiers[-1], target_layouts, seed)
    layouts = [target_layouts]
    restart, drawn, silent = len(segments), cotangents, []
    for index in range(len(segments) - 1, -1, -1):
        cotangents = segments[index].vjp(cotangents)
        options = [candidates(meta_of(value), batch, axis) for value in frontiers[index]]
        if index == 0:
            options = [[layout] for layout in source_layouts]
        fitting = tuple(
            next((layout for layout in option if not leaks(cotangent, layout, 0)), None)
            for option, cotangent in zip(options, cotangents, strict=True)
        )
        found = tuple(layout for layout in fitting if layout is not None)
        if len(found) < len(fitting):
            return None
        layouts.append(found)
        if not any(bool((cotangent != 0).any()) for cotangent in cotangents):
            silent.append(index)
            if index > 0:
                # nothing flows back through this step (a head initialised at zero): start anew before it
                cotangents = _draw(frontiers[index], layouts[-1], seed + index)
                restart, drawn = index, cotangents
    return Chain(tuple(reversed(layouts)), tuple(cotangents), restart, tuple(drawn), tuple(silent))


def _draw(values: tuple[Value, ...], layouts: tuple[Layout, ...], seed: int) -> list[Tensor]:
    """A random cotangent that belongs to the first sample."""
    return [one_sample(tensor, layout, 0) for tensor, layout in zip(random_tensors(values, seed), layouts, strict=True)]


def error(chain: Chain, frontiers: Sequence[tuple[Value, ...]]) -> float:
    """Relative difference between what the chain and what autograd's engine bring to the source."""
    truth = engine_vjp(frontiers[chain.restart], frontiers[0], chain.restart_cotangents)
    difference = scale = 0.0
    for ours, theirs in zip(chain.cotangents, truth, strict=True):
        finite = ours.isfinite()
        if not torch.equal(finite, theirs.isfinite()):
            return float("inf")
        wide = torch.complex128 if ours.is_complex() else torch.float64
        ours, theirs = ours[finite].to(wide), theirs[finite].to(wide)
        difference += float((ours - theirs).abs().square().sum())
        scale += float(theirs.abs().square().sum())
    return math.sqrt(difference / scale) if scale > 0 else math.sqrt(difference)
