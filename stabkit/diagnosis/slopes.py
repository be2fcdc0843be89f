"""Activations whose slope is bounded below 1, named where gradients vanish."""

from __future__ import annotations

import math
from dataclasses import replace

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement

_BOUNDS = {"Sigmoid": (0.25, "sigmoid' <= 1/4"), "Hardsigmoid": (1 / 6, "hardsigmoid' <= 1/6")}
_FLAT = math.log(0.5)  # mean log derivative from which a tanh takes part


def with_slopes(finding: Finding, measurement: Measurement) -> Finding:
    """A finding on a stretch that vanishes, with what its activations take away at least, or on these inputs."""
    if finding.kind != "vanishing" or len(finding.steps) < 3 or "growth_over_time" in finding.numbers:
        return finding
    inside = [a for i in finding.steps for a in measurement.steps[i].activities if not a.gate]
    for operation, (bound, words) in _BOUNDS.items():
        count = sum(activity.operation == operation for activity in inside)
        if 2 * count >= len(finding.steps):
            loss = -count * math.log(bound)
            text = f"{words}: its {count} {operation.lower()}s alone take away {loss:.1f} nats or more"
            return replace(finding, evidence=f"{finding.evidence}; {text}")
    flat = [a for a in inside if a.operation == "Tanh" and a.log_derivative < _FLAT]
    if 2 * len(flat) >= len(finding.steps):
        loss = -sum(a.log_derivative for a in flat)
        text = f"tanh' <= 1: on these inputs its {len(flat)} tanhs take away about {loss:.1f} nats, being saturated"
        return replace(finding, evidence=f"{finding.evidence}; {text}")
    return finding
