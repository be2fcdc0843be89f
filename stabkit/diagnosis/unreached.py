"""What can be said of a training pass in which nothing leads from the input to the output, so that there is no flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.lost_parameters import lost_parameter_findings
from stabkit.diagnosis.non_finite_origin import origin_of
from stabkit.tracing.forward_pass import ForwardPass


def findings_without_flow(call: ForwardPass, loss: Any) -> list[Finding]:
    """Where it stops being finite, and which parameters get no gradient; no finding names a step.

    Raises:
        TraceError: the model fails, or the loss is not a scalar of its output.
    """
    origin = origin_of(call, loss)
    if origin is None:
        return lost_parameter_findings(replace(call, through_no_grad=False), (), loss)
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
