"""Activations whose slope is bounded below 1, named where gradients vanish."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement

_FLAT = math.log(0.5)  # mean log derivative from which a tanh takes part


def with_slopes(finding: Finding, measurement: Measurement) -> Finding:
    """A finding on a stretch that vanishes, with what its activations take away at least, or on these inputs."""
    if finding.kind != "vanishing" or len(finding.steps) < 3 or "growth_over_time" in finding.numbers:
        return finding
    inside = [a for i in finding.steps for a in measurement.steps[i].activities if not a.gate]
    bounded = Counter((a.operation, a.facts.steepest) for a in inside if a.facts.steepest < 1)
    for (operation, bound), count in bounded.items():
        if 2 * count >= len(finding.steps):
            loss, name = -count * math.log(bound), operation.lower()
            steepest = f"{name}' <= {Fraction(bound).limit_denominator(99)}"
            text = f"{steepest}: its {count} {name}s alone take away {loss:.1f} nats or more"
            return replace(finding, evidence=f"{finding.evidence}; {text}")
    flat = [a for a in inside if a.operation == "Tanh" and a.log_derivative < _FLAT]
    if 2 * len(flat) >= len(finding.steps):
        loss = -sum(a.log_derivative for a in flat)
        text = f"tanh' <= 1: on these inputs its {len(flat)} tanhs take away about {loss:.1f} nats, being saturated"
        return replace(finding, evidence=f"{finding.evidence}; {text}")
    return finding
