"""Inputs and targets of unit scale in the place of those that are given: which of the two training asks for.

Either alone may do nothing: behind targets that are standardised a raw input still makes the first steps too long, and
the other way round. So they are tried one by one and together, and the fewest that train are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.inputs.features import changed, features_of
from stabkit.diagnosis.losses.regressions import Regression, regressions
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass

_FAR = 30.0  # times its size that an output is from its targets, from which it is tried; what it does decides


@dataclass(frozen=True)
class Scaling:
    """A call and a loss in which some of what is given is standardised.

    Attributes:
        what: "the targets", "the inputs" or "the inputs and the targets".
        call: the pass.
        loss: a callable on the output; of standardised targets, over what their mean leaves of it.
        remedy: what is to be done, in words.
    """

    what: str
    call: ForwardPass
    loss: Callable[[Any], Tensor]
    remedy: str


def scalings(run: TrainingRun) -> list[Scaling]:
    """What can be standardised of a training: targets and inputs, each alone and both, where far from unit scale."""
    targets = next(filter(None, (standardised_targets(run, each) for each in far_targets(run))), None)
    inputs = standardised_inputs(run)
    found = [] if targets is None else [Scaling("the targets", run.call, targets.loss, targets.remedy)]
    if inputs is not None:
        call, remedy = inputs
        found.append(Scaling("the inputs", call, run.loss, remedy))
        if targets is not None:
            both = f"{remedy}; and {targets.remedy}"
            found.append(Scaling("the inputs and the targets", call, targets.loss, both))
    return found


def standardised_inputs(run: TrainingRun) -> tuple[ForwardPass, str] | None:
    """The call with every input standardised whose features are far from unit scale, and what to do about them."""
    given = {id(t): (name, f) for name, t in run.call.given if (f := features_of(run.flow, name, t)) is not None}
    far = {key: each for key, each in given.items() if each[1].far}
    if not far:
        return None
    call = changed(run.call, lambda t: far[id(t)][1].standardised(t) if id(t) in far else t)
    if evaluated(call, training=True).output is None:  # a model that reads indices off its inputs takes no others
        return None
    words = " and ".join(f"{name!r} (feature, mean and spread: {f.words})" for name, f in far.values())
    remedy = f"standardise every feature of the input {words}, (x - mean) / std with the numbers of the training set"
    return call, remedy


def far_targets(run: TrainingRun) -> list[Regression]:
    """Regressions whose output is so far from its targets that first steps are as large as they are."""
    found = []
    for each in regressions(run.done):
        residual = rms(each.targets.double() - each.output.double())
        if math.isfinite(residual) and residual >= _FAR * max(1.0, rms(each.output)):
            found.append(each)
    return found


@dataclass(frozen=True)
class Standardised:
    """A loss of standardised targets.

    Attributes:
        loss: of an output that is stretched to where the targets lie, over what their mean leaves of it. Of a squared
            error it is the loss of standardised targets, whatever the loss is besides.
        floor: what their mean leaves of it.
        mean: the mean of all targets.
        spread: their standard deviation.
    """

    loss: Callable[[Any], Tensor]
    floor: float
    mean: float
    spread: float

    @property
    def remedy(self) -> str:
        """What is to be done, in words."""
        sign, mean, spread = "-" if self.mean >= 0 else "+", abs(self.mean), self.spread
        return (
            f"standardise the targets, (y {sign} {mean:.3g}) / {spread:.3g}, and undo it in predictions; or let the "
            f"model end in {self.mean:.3g} + {spread:.3g} * output, and divide a squared error by {spread**2:.3g}"
        )


def standardised_targets(run: TrainingRun, found: Regression) -> Standardised | None:
    """The loss of standardised targets; None where it is not clear which output they belong to.

    Nor where a constant is all that there is to learn.
    """
    named = [(path, t) for path, t in named_tensors(run.done.output) if t.requires_grad]
    paths = {path: t.shape for path, t in named if t.grad_fn is found.node or len(named) == 1}
    if len(paths) != 1:
        return None
    columns = found.targets.dim() > 1 and list(paths.values()) == [found.targets.shape]
    dims = [d for d in range(found.targets.dim()) if not (columns and d == 1)]
    mean = found.targets.mean(dims, keepdim=True) if columns else found.targets.mean()
    spread = found.targets.std(dims, correction=0, keepdim=True) if columns else found.targets.std(correction=0)

    def stretched(output: Any, by: Tensor) -> Any:
        chosen = {id(t) for path, t in named_tensors(output) if path in paths}
        return map_tensors(output, lambda t: mean + by * t if id(t) in chosen else t)

    with torch.no_grad():
        floor = float(run.loss(stretched(run.done.output, torch.zeros_like(spread))))
    if not (math.isfinite(floor) and floor > 0 and bool((spread > 0).all())):
        return None
    every = found.targets.double()
    return Standardised(
        lambda output: run.loss(stretched(output, spread)) / floor,
        floor,
        float(every.mean()),
        float(every.std(correction=0)),
    )


def rms(tensor: Tensor) -> float:
    """Root mean square of the moduli of the entries; 0 where there are none."""
    return float(tensor.detach().abs().double().square().mean().sqrt()) if tensor.numel() else 0.0
