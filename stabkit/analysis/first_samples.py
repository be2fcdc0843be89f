"""The flow of the first samples of a batch alone, where that is the same flow at a part of the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from stabkit.errors import StabkitError
from stabkit.tracing import Flow, trace
from stabkit.tracing.recording.batch_parts import Call
from stabkit.tracing.recording.wrappers import modules_behind


def of_first_samples(flow: Flow, model: Any, call: Call, count: int, options: Mapping[str, Any]) -> Flow:
    """The flow of the first ``count`` samples; the flow itself where they cannot be had alone.

    Products with a Jacobian pass all samples of a flow, also where only the first one's spectrum is wanted. The
    shorter flow is taken only if it has the same steps and its states are those of the first samples: a model in
    training mode draws other random numbers, or lets samples meet in its norms.

    Args:
        flow: the flow of the whole batch.
        model: that was traced.
        call: the whole batch.
        count: how many samples are wanted.
        options: the other arguments of ``stabkit.trace``.
    """
    training = any(module.training for module in modules_behind(model).modules())
    if count >= flow.batch or flow.batch != call.samples or training:
        return flow
    part = call.part(0, count)
    try:
        short = trace(model, *part.inputs, kwargs=part.kwargs, batch_dim=call.batch_dim, check=False, **options)
    except StabkitError:  # a model may refuse a smaller batch; then all of it is passed
        return flow
    return short if _same(short, flow, count) else flow


def _same(short: Flow, flow: Flow, count: int) -> bool:
    if short.batch != count or [step.name for step in short.steps] != [step.name for step in flow.steps]:
        return False
    for one, whole in zip(short.states, flow.states, strict=True):
        # a sample alone keeps the axis of the batch, of size one, which leaves its entries in their order
        sizes = [[math.prod(shape) for shape in state.sample_shapes] for state in (one, whole)]
        if sizes[0] != sizes[1] or one.space.dtype != whole.space.dtype:
            return False
        found, expected = one.flatten(), whole.flatten()[:count]
        eps = torch.finfo(expected.dtype).eps
        if expected.numel() and not bool((found - expected).abs().max() <= eps**0.75 * expected.abs().max()):
            return False
    return True
