"""States and gradients that are not finite, and where that begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stabkit.diagnosis import remedies
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement


def non_finite_findings(measurement: Measurement) -> list[Finding]:
    """The first step whose parameters or results are not finite; else the first where the gradient ceases to be."""
    steps = measurement.steps
    poisoned = [step for step in steps if any(not weight.finite for weight in step.weights)]
    broken = [step for step in steps if not step.finite]
    lost = np.isnan(measurement.growth) | np.isposinf(measurement.growth)
    backward = [int(i) for i in np.flatnonzero(lost.any(axis=1))]
    if broken or poisoned:
        first = min([*broken, *poisoned], key=lambda step: step.index)
        return [_forward(first, _everything(first, steps, backward))]
    if backward:
        return [_backward(steps[max(backward)], backward)]  # the gradient travels from the last step to the first
    return []


def _everything(first: StepMeasurement, steps: Sequence[StepMeasurement], backward: Sequence[int]) -> tuple[int, ...]:
    del steps
    return tuple(sorted({first.index, *backward}))


def _forward(step: StepMeasurement, where: tuple[int, ...]) -> Finding:
    bad = [weight.path for weight in step.weights if not weight.finite]
    name = step.name
    if bad:
        evidence = f"{', '.join(bad)} of {name} {'is' if len(bad) == 1 else 'are'} NaN or infinite"
        remedy = f"go back to a checkpoint before {', '.join(bad)} became so, or draw anew"
    else:
        evidence = f"the state behind {name} is NaN or infinite, and the one before it is not"
        remedy = f"look at the output of {step.module_path or name}: its activations overflow, or it divides by zero"
    actions = tuple(
        remedies.redraw(weight.path, 1.0 / weight.unit if weight.kind == "matrix" else 0.0)
        for weight in step.weights
        if not weight.finite
    )
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(step.index, *(i for i in where if i != step.index)),
        module_path=step.module_path,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference="",
        numbers={"parameters": float(len(bad))},
        actions=actions,
    )


def _backward(step: StepMeasurement, where: Sequence[int]) -> Finding:
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=tuple(where),
        module_path=step.module_path,
        confidence=1.0,
        evidence=f"the gradient is not finite at {step.name}, the first step it meets on its way back, "
        "although the states are",
        remedy=f"look at the derivatives in {step.module_path or step.name}: that of a root at zero is infinite",
        reference="",
        numbers={"steps": float(len(where))},
    )


def all_finite(measurement: Measurement) -> bool:
    """Whether nothing is NaN or infinite; a gradient of zero is finite."""
    growth = measurement.growth
    return not bool((np.isnan(growth) | (growth == math.inf)).any()) and all(
        step.finite and all(weight.finite for weight in step.weights) for step in measurement.steps
    )
