"""What can be said of a training pass in which nothing leads from the input to the output, so that there is no flow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from stabkit.diagnosis.finding import Finding, of_training
from stabkit.diagnosis.losses.stops import cut_stop
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.no_gradient.hidden_cuts import hidden_cut_findings
from stabkit.diagnosis.no_gradient.lost_parameters import lost_parameter_findings
from stabkit.diagnosis.non_finite.origin import origin_of
from stabkit.diagnosis.remedies.made_once import made_once
from stabkit.diagnosis.suspects import Diagnosis, ordered
from stabkit.diagnosis.verdict import Verdict
from stabkit.tracing.cutting.endpoints import UnreachedError, scalar_loss
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass, training_pass


def diagnosis_without_flow(call: ForwardPass, loss: Any, why: str) -> Diagnosis:
    """What `examine` says of a flow, where there is none: no step was measured.

    Raises:
        TraceError: the model fails, or the loss is not a scalar of its output.
    """
    with made_once():
        found = tuple(ordered(findings_without_flow(call, loss)))
    broken = any(finding.kind == "non_finite" for finding in found)
    name, said = ("non-finite", "The loss or its gradient is not finite.") if broken else ("not judged", "")
    verdict = Verdict(name, said or f"Not judged: {why}.", math.nan, (math.nan, math.nan), (0, 0))
    nothing = np.zeros((0, 0))
    return Diagnosis(verdict, found, Measurement((), nothing, nothing, nothing, (), str(loss), 0))


def findings_without_flow(call: ForwardPass, loss: Any) -> list[Finding]:
    """Where it stops being finite, and which parameters get no gradient; no finding names a step.

    Raises:
        TraceError: the model fails, or the loss is not a scalar of its output.
    """
    origin = origin_of(call, loss)
    if origin is None:
        call = replace(call, through_no_grad=False)
        done = training_pass(call, loss, differentiate=False)
        cut = _loss_cut_off(call, done, loss)
        if cut is not None:
            return [cut]
        return [*lost_parameter_findings(call, (), loss, done), *hidden_cut_findings(call, loss, call, done)]
    what = "the first derivative that is not finite, on the way back, is that of" if origin.backward else "begins at"
    return [
        Finding(
            kind="non_finite",
            severity="critical",
            steps=(),
            module_path=origin.path,
            confidence=1.0,
            evidence=f"{what} {origin.place}: {origin.cause.text}",
            remedy=origin.cause.remedy,
            reference="Goldberg, What every computer scientist should know about floating-point arithmetic, 1991",
            numbers=dict(origin.cause.numbers),
        )
    ]


def _loss_cut_off(call: ForwardPass, done: TrainingPass, loss: Any) -> Finding | None:
    """A loss that no parameter reaches although outputs carry gradient: it trains nothing, and may run all the same."""
    carries = any(tensor.requires_grad for _, tensor in named_tensors(done.output))
    if loss is None or done.loss is not None or not carries or not done.parameters:
        return None
    try:
        scalar_loss(loss, done.output)
    except UnreachedError as error:
        stop = cut_stop(call, loss)
        where = f"; {stop.words}" if stop is not None else ""
        return of_training(
            kind="no_gradient",
            severity="critical",
            evidence=f"{error}{where}: none of {len(done.parameters)} parameters gets a gradient, though the output "
            "has one",
            remedy=(
                "compute the loss from the output by operations that have a derivative" if stop is None else stop.remedy
            )
            + ("; and leave requires_grad_() on the loss away" if "requires_grad_" in str(error) else ""),
            reference="PyTorch documentation, Autograd mechanics",
            numbers={"parameters": float(len(done.parameters))},
        )
    return None
