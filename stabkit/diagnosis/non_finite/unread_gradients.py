"""Gradients that are not finite where nothing is trained: on the way from an input to the first parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stabkit.diagnosis.finding import Finding
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import entries_are_finite
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.training_pass import training_pass


def reach_no_parameter(flow: Flow, loss: Any) -> bool:
    """Whether the loss and the gradients of all parameters are finite, and nobody asks for that of an input.

    Args:
        flow: the traced pass, whose gradients are not finite at some state.
        loss: a callable on the output that returns a scalar.
    """
    call = replace(flow.forward_pass, through_no_grad=False)
    if any(t.requires_grad for _, t in named_tensors([list(call.inputs), call.kwargs])):
        return False
    done = training_pass(call, loss)
    found = [g for g in done.gradients.values() if g is not None]
    return bool(found) and done.loss is not None and all(map(entries_are_finite, [done.loss.detach(), *found]))


def as_facts(findings: list[Finding]) -> list[Finding]:
    """The same as facts: training does not meet them."""
    met = "no parameter lies before it and the gradients of all parameters are finite, so training does not meet it"
    return [
        replace(
            finding,
            severity="info",
            evidence=f"{finding.evidence}; {met}",
            remedy=f"none is needed to train; for gradients of the input: {finding.remedy}",
            actions=(),
        )
        for finding in findings
    ]
