"""Weights that are trained in half precision: what Adam's eps and small steps become in it.

Adam keeps the mean square of each gradient and divides by its root plus eps. In float16 the squares of gradients below
about 8e-3 are zero when they are weighted by 1 - 0.999, and so is an eps of 1e-8: the step is something over zero. In
bfloat16 a step is lost where it is less than 1/256 of the weight that it is added to. Both are measured with steps of
Adam on a copy, in half precision and in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding
from stabkit.diagnosis.non_finite.gradient_underflow import ScaledLoss
from stabkit.diagnosis.remedies.applying import LARGEST, copied, is_small
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.diagnosis.remedies.usual_training import EPSILON, RATES, adam, left_after
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass

_HALF = (torch.float16, torch.bfloat16)
_LARGE_EPSILON = 1e-4  # that float16 holds
_FINE = 2e-5  # of BERT's paper, section A.3, and of most that fine-tune since
_CLEARLY = 0.05  # of the first loss, by which float32 must end lower
_MICIKEVICIUS = "Micikevicius et al., Mixed precision training, 2018, section 3.1"


def half_weight_findings(run: TrainingRun) -> list[Finding]:
    """Steps of Adam that half precision makes infinite, or takes away."""
    flow, loss, call, done = run.flow, run.loss, run.call, run.done
    half = {path: p for path, p in done.parameters.items() if p.dtype in _HALF}
    if not half:
        return []
    if isinstance(loss, ScaledLoss):  # the optimizer sees the gradients of the loss as it is
        loss = loss.loss
        done = training_pass(call, loss)
    moved = {path: (p, g.to_dense()) for path, p in half.items() if (g := done.gradients.get(path)) is not None}
    broken, lost, count, largest = 0, 0, 0, 0.0
    for weight, gradient in moved.values():
        largest = max(largest, float(gradient.double().square().mean().sqrt()))
        after = weight.detach().clone()
        adam(RATES[-1])(1, after, gradient, [])
        broken += int((~after.isfinite()).sum())
        lost += int(((after == weight) & (gradient != 0)).sum())
        count += after.numel()
    if not broken and largest < 10 * EPSILON:  # below eps, a step is lost to that
        return []
    dtype = next(iter(half.values())).dtype
    if not broken and not lost:
        return _at_fine_tuning(flow, call, loss, dtype, moved)
    plain, single = left_after(call, loss, [adam(r) for r in RATES]), _in_float32(call, loss, RATES)
    if plain is not None and single is not None and not single < plain - _CLEARLY:
        return [] if broken else _at_fine_tuning(flow, call, loss, dtype, moved)  # it trains as well as it is
    if not broken and (plain is None or single is None):
        return []  # what is lost of single steps may well be regained
    return [_finding(flow, call, loss, dtype, broken, lost, count, (plain, single))]


def _at_fine_tuning(
    flow: Flow, call: ForwardPass, loss: Any, dtype: torch.dtype, moved: Mapping[str, tuple[Tensor, Tensor]]
) -> list[Finding]:
    """A fact where the steps of the rates that trained models are tuned with are lost, and float32 learns with them."""
    lost, count = 0, 0
    for weight, gradient in moved.values():
        after = weight.detach().clone()
        adam(_FINE)(1, after, gradient, [])
        lost += int(((after == weight) & (gradient != 0)).sum())
        count += after.numel()
    if not 2 * lost > count:
        return []
    plain, single = left_after(call, loss, [adam(_FINE)]), _in_float32(call, loss, [_FINE])
    if plain is None or single is None or not single < plain - _CLEARLY:
        return []
    name = str(dtype).rpartition(".")[2]
    evidence = (
        f"the weights are {name}: steps of Adam at the usual rates train them, and at rates such as {_FINE:g}, which "
        f"models are fine-tuned with, {lost / count:.0%} of a step are lost, less than the last digit of a weight "
        f"({torch.finfo(dtype).eps:.2g} of it); tried on a copy: {STEPS} steps at {_FINE:g} leave {plain:.1%} of the "
        f"loss, and with all in float32 {single:.1%}"
    )
    remedy = (
        f"at small rates keep the weights in float32: model.float(), with torch.autocast(..., dtype={dtype}) round the "
        "forward pass, which was not tried; or use an optimizer that keeps a copy of them in float32"
    )
    steps = tuple(range(len(flow.steps)))
    numbers = {"lost": float(lost), "weights": float(count)}
    return [Finding("precision_loss", "info", steps, LOSS, 1.0, evidence, remedy, _MICIKEVICIUS, numbers)]


def _finding(
    flow: Flow,
    call: ForwardPass,
    loss: Any,
    dtype: torch.dtype,
    broken: int,
    lost: int,
    count: int,
    left: tuple[float | None, float | None],
) -> Finding:
    name, (plain, single) = str(dtype).rpartition(".")[2], left
    around = f"torch.autocast(..., dtype={dtype}) round the forward pass{', with torch.amp.GradScaler,' * bool(broken)}"
    remedy = (
        f"keep the weights in float32: model.float(); {around} computes in {name} all the same, which was not tried"
    )
    if broken:
        evidence = (
            f"the weights are {name}, in which Adam's eps of {EPSILON:g} is zero and so are the squares of small "
            f"gradients: its first step divides by zero and makes {broken} of {count} entries infinite or NaN"
        )
        larger = left_after(call, loss, [adam(r, eps=_LARGE_EPSILON) for r in RATES])
        if larger is not None and larger < 1 - _CLEARLY:
            remedy += f"; or give Adam an eps that {name} holds: {_LARGE_EPSILON:g} leaves {larger:.1%} of the loss"
    else:
        evidence = (
            f"the weights are {name}, and a step of {RATES[-1]:g} is lost in {lost / count:.0%} of them, since it is "
            f"less than the last of their digits ({torch.finfo(dtype).eps:.2g})"
        )
    if plain is not None and single is not None:
        ends = f"leave {plain:.1%} of the loss" if math.isfinite(plain) else "end in what is not finite"
        evidence += f"; tried on a copy: {STEPS} steps of Adam {ends}, and with all in float32 {single:.1%}"
    return Finding(
        kind="precision_loss",
        # training that is not finite after some steps has failed
        severity="critical" if broken and plain is not None and not math.isfinite(plain) else "warning",
        steps=tuple(range(len(flow.steps))),
        module_path=LOSS,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference=_MICIKEVICIUS,
        numbers={"broken": float(broken), "lost": float(lost), "weights": float(count)},
    )


def _in_float32(call: ForwardPass, loss: Any, rates: Sequence[float]) -> float | None:
    """What Adam leaves of the loss with weights and inputs in float32; None where the model does not stand that."""
    if call.model is not call.module or not is_small(call.module, LARGEST):
        return None

    def single(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor

    inputs, kwargs = map_tensors([call.inputs, call.kwargs], single)
    try:
        model = copied(call.module).float()
        return left_after(
            replace(call, model=model, module=model, inputs=tuple(inputs), kwargs=kwargs),
            loss,
            [adam(r) for r in rates],
        )
    except (StabkitError, RuntimeError):
        return None
