"""Batch norms whose statistics are none, or chance.

In eval mode, before any were collected, they are the identity, which nobody means. Such a network is judged with the
statistics of the batch that it is given, as it would be in training. They are collected by one more forward pass and
stand in the place of the running ones while the flow is traced anew; the model keeps its own.

A variance of two or three values, be it of a small batch in training mode, is near zero for some channels, and the
gradient there grows without bound: that is a fact of the batch, and says nothing of the network.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabkit.tracing import Flow
from stabkit.tracing.graph.values import Value, meta_of, operation

NOTE = (
    "batch norms in eval mode have never collected statistics: judged with those of this batch, as in training; "
    "train the model, or call model.train(), to have them judged as they are"
)
_FEWEST = 8  # values of a channel whose variance is worth something: within a factor of 2 for 95 % of normal samples
_NEEDED = f"give at least {_FEWEST} values per channel, from more samples or larger inputs"
TOO_FEW = (
    "batch norms in eval mode have never collected statistics, and this batch is too small to make them: " + _NEEDED
)
BY_CHANCE = "batch norms in training mode take their statistics from a batch that is too small for them: " + _NEEDED


def uncollected(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that use running statistics as they were made: mean 0, variance 1, of no batch."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and not m.training and is_fresh(m)]


def is_fresh(norm: _BatchNorm) -> bool:
    """Whether a norm holds what it was made with, mean 0 and variance 1, of no batch."""
    seen = norm.num_batches_tracked
    return holds_what_it_was_made_with(norm) and (seen is None or int(seen) == 0)


def holds_what_it_was_made_with(norm: _BatchNorm) -> bool:
    """Whether the statistics of a norm are mean 0 and variance 1, however many batches were seen."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or mean.is_meta:
        return False
    return bool((mean == 0).all()) and bool((variance == 1).all())


def by_batch(flow: Flow) -> bool:
    """Whether batch norms take their statistics from the batch at hand."""
    return NOTE in flow.notes or any(isinstance(m, _BatchNorm) and m.training for m in flow.model.modules())


def without_statistics(flow: Flow) -> str:
    """Why a flow cannot be judged for want of statistics, or ``""``."""
    return next((why for why in (TOO_FEW, BY_CHANCE) if why in flow.notes), "")


def with_statistics(flow: Flow) -> Flow:
    """The flow, or, where batch norms are fresh, the same one traced anew with the statistics of its batch.

    A note of the flow says what was done, or why there are no statistics worth the name.
    """
    if NOTE in flow.notes or without_statistics(flow):
        return flow
    if _fewest_values(flow) < _FEWEST:
        return replace(flow, notes=(*flow.notes, BY_CHANCE))
    if not uncollected(flow.model):
        return flow
    if flow.steps[0].segment.recomputes:
        return flow  # what is computed anew later would use the norms' own statistics
    return traced_anew(flow, check=flow.chain_error is not None)  # a report shows the error of what it measured


def traced_anew(flow: Flow, *, check: bool = False) -> Flow:
    """The flow traced anew, with statistics of its batch where there are none; its chain is checked on demand."""
    fresh = uncollected(flow.model)
    if not fresh:
        return flow.again(check=check)
    found = collected(flow, fresh)
    if found is None:
        return replace(flow, notes=(*flow.notes, TOO_FEW))
    with standing(found):
        traced = flow.again(check=check)
    return replace(traced, notes=(*traced.notes, NOTE))


def _fewest_values(flow: Flow) -> float:
    """The fewest values per channel that a batch norm in training mode normalises by; infinity where there is none."""
    own = any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in flow.model.modules())
    if not own or flow.steps[0].segment.recomputes:
        return math.inf
    nodes: list[Any] = [node for step in flow.steps for node in step.segment.nodes if "BatchNorm" in operation(node)]
    shapes = [meta_of(Value(node, 0)).shape for node in nodes if getattr(node, "_saved_training", True)]
    return min((math.prod(shape) / shape[1] for shape in shapes), default=math.inf)


def collected(flow: Flow, norms: list[_BatchNorm]) -> dict[_BatchNorm, tuple[torch.Tensor, torch.Tensor]] | None:
    """Mean and variance of the batch at every norm, by one forward pass; None where the batch is too small."""
    call, counts = flow.forward_pass, []

    def count(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        counts.append(inputs[0].numel() // inputs[0].shape[1])

    with call.kept(), torch.no_grad():
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # the statistics are those of this batch alone, whatever was seen before
            norm.register_forward_pre_hook(count)
        try:
            call.called()
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                return None
            raise
        if min(counts, default=0) < _FEWEST:
            return None
        return {norm: (_held(norm.running_mean), _held(norm.running_var)) for norm in norms}


def _held(buffer: torch.Tensor | None) -> torch.Tensor:
    assert buffer is not None  # `is_fresh` has looked
    return buffer.detach().clone()


@contextlib.contextmanager
def standing(found: dict[_BatchNorm, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """These statistics in the place of the norms' own."""
    own = {norm: (norm.running_mean, norm.running_var) for norm in found}
    try:
        for norm, (mean, variance) in found.items():
            norm.running_mean, norm.running_var = mean, variance
        yield
    finally:
        for norm, (kept_mean, kept_variance) in own.items():
            norm.running_mean, norm.running_var = kept_mean, kept_variance


def with_norms_of_evaluation(model: nn.Module) -> bool:
    """Whether batch norms, which standardise while they train, are in eval mode with the model."""
    return not model.training and any(isinstance(module, _BatchNorm) for module in model.modules())
