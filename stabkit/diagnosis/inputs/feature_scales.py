"""Inputs whose features have very different sizes, or lie far from zero beside their spread.

The curvature of the first layer is the second moment of its input, the square of a size. Features of size 1e5 beside
others of 0.01, or years around 2000, give it one direction that bounds the rate and others in which nothing moves at
that rate. Tried by training for a few steps on the inputs as they are and on standardised ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs.features import Features, changed, features_of
from stabkit.diagnosis.remedies.short_training import STEPS, short_training
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after, sgd
from stabkit.diagnosis.states.batch_statistics import with_norms_of_evaluation
from stabkit.tracing import Flow
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import Observer, TrainingPass, training_pass

# shares of the loss of a fresh network on standardised inputs. In the four cases that are tested 20 steps on those
# leave .04 of it, on the inputs as they are .86 and more, and behind a norm that standardises .03; labels that nothing
# tells leave .8. What learns more slowly than the first of these limits is not told
_LEARNS = 0.25  # what few steps on standardised inputs must get below
_DOES_NOT = 0.5  # what the same steps on the inputs as they are must stay above
_REFERENCE = "LeCun, Bottou, Orr and Müller, Efficient backprop, 1998, sections 4.3 and 5.1"


def feature_scale_findings(flow: Flow, loss: Any, call: ForwardPass, done: TrainingPass) -> list[Finding]:
    """A finding where a few steps learn from standardised inputs and not from those that are given."""
    given = [*named_tensors(list(call.inputs)), *named_tensors(call.kwargs)]
    found = {id(t): f for name, t in given if (f := features_of(flow, name, t)) is not None and f.far}
    if not found or done.loss is None or with_norms_of_evaluation(call.module) or _differentiates(call, loss):
        return []
    other = changed(call, lambda t: found[id(t)].standardised(t) if id(t) in found else t)
    if evaluated(other, training=True).output is None:  # a model that reads indices off its inputs takes no others
        return []
    fresh = training_pass(other, loss, differentiate=False).loss
    if fresh is None or not float(fresh.detach()) > 0:
        return []
    first, start = float(done.loss.detach()), float(fresh.detach())
    cured = _end(other, loss, start)
    if not cured < _LEARNS * start:
        return []
    plain = _end(call, loss, first)
    if plain > _DOES_NOT * start and (trained := short_training(call, loss)) is not None:
        plain = min(plain, trained.last)
    if not plain > _DOES_NOT * start:
        return []
    return [_finding(flow, found, first, start, plain, cured)]


def _end(call: ForwardPass, loss: Any, first: float) -> float:
    """The loss after a few steps, at the best of the usual optimizers."""
    left = [left_after(call, loss, [by(rate) for rate in RATES]) for by in (adam, sgd)]
    known = [share for share in left if share is not None]
    return min(known) * first if known else math.nan


class _Derivatives(TorchFunctionMode):
    """Notes whether a derivative is taken within a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.taken = self.taken or func in (torch.autograd.grad, torch.autograd.backward)
        return func(*args, **(kwargs or {}))


def _differentiates(call: ForwardPass, loss: Any) -> bool:
    """Whether the model or the loss takes derivatives: in other coordinates those are others."""
    watch = _Derivatives()
    training_pass(call, loss, Observer(watch), differentiate=False)
    return watch.taken


def _finding(
    flow: Flow, found: Mapping[int, Features], first: float, start: float, plain: float, cured: float
) -> Finding:
    worst = max(found.values(), key=lambda f: f.apart)
    apart, offset = worst.apart, worst.offset
    sizes = (
        f"sizes up to {apart:.3g} times apart" if len(worst.mean) > 1 else f"the size {float(worst.sizes.max()):.3g}"
    )
    evidence = (
        f"the features of the input {worst.name!r} have {sizes} and means up to {offset:.3g} spreads from zero (by "
        f"feature, mean and spread: {worst.words}), and the curvature of the first layer along each goes with the "
        f"square of its size; tried on a copy, {STEPS} steps of SGD and Adam at "
        f"{' or '.join(f'{rate:g}' for rate in RATES)} take the loss from {first:.3g} to {plain:.3g} at best, and with "
        f"standardised inputs from {start:.3g} to {cured:.3g}"
    )
    return Finding(
        kind="input_scale",
        severity="warning",
        steps=(0,),
        module_path=flow.steps[0].module_path,
        confidence=1.0,
        evidence=evidence,
        remedy="standardise every feature where the data are read, (x - mean) / std with the numbers of the training "
        "set, which go with the model; the logarithm first of what spans several decades, and of times and "
        "coordinates the distance from the first",
        reference=_REFERENCE,
        numbers={"apart": apart, "offset": offset, "plain": plain, "standardised": cured},
    )
