"""What can be said of a training pass in which nothing leads from the input to the output, so that there is no flow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.hidden_cuts import hidden_cut_findings
from stabkit.diagnosis.lost_parameters import lost_parameter_findings
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.non_finite_origin import origin_of
from stabkit.diagnosis.suspects import Diagnosis, ordered
from stabkit.diagnosis.verdict import Verdict
from stabkit.tracing.forward_pass import ForwardPass
from stabkit.tracing.training_pass import training_pass


def diagnosis_without_flow(call: ForwardPass, loss: Any, why: str) -> Diagnosis:
    """What `examine` says of a flow, where there is none: no step was measured.

    Raises:
        TraceError: the model fails, or the loss is not a scalar of its output.
    """
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
