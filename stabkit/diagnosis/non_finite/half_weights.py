"""Weights that are trained in half precision: what Adam's eps and small steps become in it.

Adam keeps the mean square of each gradient and divides by its root plus eps. In float16 the squares of gradients below
about 8e-3 are zero when they are weighted by 1 - 0.999, and so is an eps of 1e-8: the step is something over zero. In
bfloat16 a step is lost where it is less than 1/256 of the weight that it is added to. Both are measured with steps on a
copy, in half precision and in float32: of the optimizer that is given, or else of Adam as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding
from stabkit.diagnosis.non_finite.gradient_underflow import ScaledLoss
from stabkit.diagnosis.remedies.applying import LARGEST, copied, is_small, trainable
from stabkit.diagnosis.remedies.given_optimizer import named_settings, steps_of_given, transferred
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
    dtype = next(iter(half.values())).dtype
    if run.optimizer is not None:
        return _of_given(run, loss, dtype, run.optimizer)
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
    if not broken and not lost:
        return _at_fine_tuning(flow, call, loss, dtype, moved)
    plain, single = left_after(call, loss, [adam(r) for r in RATES]), _in_float32(call, loss, RATES)
    if plain is not None and single is not None and not single < plain - _CLEARLY:
        return [] if broken else _at_fine_tuning(flow, call, loss, dtype, moved)  # it trains as well as it is
    if not broken and (plain is None or single is None):
        return []  # what is lost of single steps may well be regained
    larger = left_after(call, loss, [adam(r, eps=_LARGE_EPSILON) for r in RATES]) if broken else None
    return [_finding(flow, _Steps(dtype, broken, lost, count, plain, single, larger))]


@dataclass(frozen=True)
class _Steps:
    """What steps of an optimizer make of weights in half precision, and of the loss.

    Attributes:
        dtype: of the weights.
        broken: entries that the first step makes infinite or NaN.
        lost: entries that it leaves what they were.
        count: of all entries.
        plain: what a few steps leave of the loss, infinite where they end in what is not finite; None where not tried.
        single: the same in float32.
        larger: the same in half precision with a larger eps.
        optimizer: its class.
        rate: its rate.
        eps: its eps that the dtype rounds to zero; None where there is none.
    """

    dtype: torch.dtype
    broken: int
    lost: int
    count: int
    plain: float | None
    single: float | None
    larger: float | None
    optimizer: str = "Adam"
    rate: float = RATES[-1]
    eps: float | None = EPSILON


def _of_given(run: TrainingRun, loss: Any, dtype: torch.dtype, optimizer: torch.optim.Optimizer) -> list[Finding]:
    """The same of the optimizer that trains the model, with its own eps, rate and all else that it holds."""
    call = run.call
    steps = steps_of_given(call, loss, optimizer)
    if steps is None:
        return []
    finite = math.isfinite(steps.left)
    if finite and not steps.lost:
        return []
    single = _given_in_float32(call, loss, optimizer)
    if not finite and not (single is not None and math.isfinite(single)) and not steps.broken:
        return []  # it diverges in whatever dtype
    if single is not None and not single < steps.left - _CLEARLY:
        return []  # it trains as well as it is, or no better in float32
    if finite and single is None:
        return []
    zero = [eps for eps in named_settings(optimizer, "eps") if eps > 0 == float(torch.tensor(eps, dtype=dtype))]
    larger = None
    if not finite and zero:
        own = list(trainable(call.module).values())
        held = steps_of_given(call, loss, transferred(optimizer, own, own, eps=_LARGE_EPSILON))
        larger = None if held is None else held.left
    rate = max(named_settings(optimizer, "lr"), default=math.nan)
    told = _Steps(dtype, steps.broken, steps.lost, steps.count, steps.left, single, larger)
    return [
        _finding(run.flow, replace(told, optimizer=type(optimizer).__name__, rate=rate, eps=max(zero, default=None)))
    ]


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


def _finding(flow: Flow, steps: _Steps) -> Finding:
    name, plain, single = str(steps.dtype).rpartition(".")[2], steps.plain, steps.single
    fails = bool(steps.broken) or (plain is not None and not math.isfinite(plain))
    scaled = ", with torch.amp.GradScaler," * fails
    remedy = (
        f"keep the weights in float32: model.float(); torch.autocast(..., dtype={steps.dtype}) round the forward "
        f"pass{scaled} computes in {name} all the same, which was not tried"
    )
    makes = f"makes {steps.broken} of {steps.count} entries infinite or NaN"
    if fails and steps.eps is not None:
        small = f"the weights are {name}, in which {steps.optimizer}'s eps of {steps.eps:g} is zero and so are the "
        evidence = f"{small}squares of small gradients: its "
        evidence += f"first step divides by zero and {makes}" if steps.broken else "steps divide by zero"
        if steps.larger is not None and steps.larger < 1 - _CLEARLY:
            remedy += (
                f"; or give {steps.optimizer} an eps that {name} holds: {_LARGE_EPSILON:g} leaves {steps.larger:.1%} "
                "of the loss"
            )
    elif fails:
        first = f"and the first step of {steps.optimizer} at {steps.rate:g} {makes}"
        evidence = f"the weights are {name}, {first if steps.broken else 'in whose range the training does not stay'}"
    else:
        evidence = (
            f"the weights are {name}, and a step of {steps.rate:g} is lost in {steps.lost / steps.count:.0%} of them, "
            f"since it is less than the last of their digits ({torch.finfo(steps.dtype).eps:.2g})"
        )
    if plain is not None and single is not None:
        ends = f"leave {plain:.1%} of the loss" if math.isfinite(plain) else "end in what is not finite"
        trained = f"{STEPS} steps of {steps.optimizer}"
        evidence += f"; tried on a copy: {trained} {ends}, and with all in float32 {single:.1%}"
    return Finding(
        kind="precision_loss",
        # training that is not finite after some steps has failed
        severity="critical" if fails and plain is not None and not math.isfinite(plain) else "warning",
        steps=tuple(range(len(flow.steps))),
        module_path=LOSS,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference=_MICIKEVICIUS,
        numbers={"broken": float(steps.broken), "lost": float(steps.lost), "weights": float(steps.count)},
    )


def _in_float32(call: ForwardPass, loss: Any, rates: Sequence[float]) -> float | None:
    """What Adam leaves of the loss with weights and inputs in float32; None where the model does not stand that."""
    try:
        single = _single(call)
        return None if single is None else left_after(single, loss, [adam(r) for r in rates])
    except (StabkitError, RuntimeError):
        return None


def _given_in_float32(call: ForwardPass, loss: Any, optimizer: torch.optim.Optimizer) -> float | None:
    """The same of the optimizer that is given."""
    try:
        single = _single(call)
        if single is None:
            return None
        own, others = (list(module.parameters()) for module in (call.module, single.module))
        steps = steps_of_given(single, loss, transferred(optimizer, own, others))
    except (StabkitError, RuntimeError):
        return None
    return None if steps is None else steps.left


def _single(call: ForwardPass) -> ForwardPass | None:
    """A copy of model and inputs in float32; None where the model is too large, or no module by itself."""
    if call.model is not call.module or not is_small(call.module, LARGEST):
        return None

    def single(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor

    inputs, kwargs = map_tensors([call.inputs, call.kwargs], single)
    model = copied(call.module).float()
    return replace(call, model=model, module=model, inputs=tuple(inputs), kwargs=kwargs)
