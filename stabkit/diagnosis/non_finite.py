"""States and gradients that are not finite, and where that begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stabkit.diagnosis import remedies
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import factor
from stabkit.diagnosis.weight_faults import WeightFault, weight_faults


def non_finite_findings(measurement: Measurement, thresholds: Thresholds) -> list[Finding]:
    """An input that is not finite; else the first step whose parameters or results are not, or whose gradient is not.

    Where states overflow, a weight before that is far larger than in its peers is named as the cause.
    """
    if _given_broken(measurement):
        return [_input(measurement)]
    steps = measurement.steps
    poisoned = [step for step in steps if any(not weight.finite for weight in step.weights)]
    broken = [step for step in steps if not step.finite]
    lost = np.isnan(measurement.growth) | np.isposinf(measurement.growth)
    backward = [int(i) for i in np.flatnonzero(lost.any(axis=1))]
    if broken or poisoned:
        first = min([*broken, *poisoned], key=lambda step: step.index)
        faults = weight_faults(steps, thresholds) if first in broken and first not in poisoned else []
        cause = next((f for f in faults if f.step <= first.index and f.deviation.size > 0), None)
        where = tuple(sorted({first.index, *backward}))
        return [_forward(first, where) if cause is None else _overflow(first, steps[cause.step], cause, where)]
    if backward:
        return [_backward(steps[max(backward)], backward)]  # the gradient travels from the last step to the first
    return []


def _forward(step: StepMeasurement, where: tuple[int, ...]) -> Finding:
    poisoned = [weight for weight in step.weights if not weight.finite]
    bad = [weight.path for weight in poisoned]
    name = step.name
    if bad:
        evidence = f"{', '.join(bad)} of {name} {'is' if len(bad) == 1 else 'are'} NaN or infinite"
        remedy = f"go back to a checkpoint before {', '.join(bad)} became so, or draw anew"
    else:
        evidence = f"the state behind {name} is NaN or infinite, and the one before it is not"
        remedy = f"look at the output of {step.module_path or name}: its activations overflow, or it divides by zero"
    actions = tuple(
        remedies.redraw(weight.path, 1.0 / weight.unit if weight.kind == "matrix" else 0.0) for weight in poisoned
    )
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(step.index, *(i for i in where if i != step.index)),
        module_path=step.home(poisoned),
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference="",
        numbers={"parameters": float(len(bad))},
        actions=actions,
    )


def _overflow(step: StepMeasurement, home: StepMeasurement, cause: WeightFault, where: tuple[int, ...]) -> Finding:
    remedy = remedies.to_peers([cause])
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(home.index, *(i for i in where if i != home.index)),
        module_path=home.home([cause.weight]),
        confidence=1.0,
        evidence=f"the state behind {step.name} is NaN or infinite, and the one before it is not; {cause.weight.path} "
        f"is {factor(cause.deviation.size)} times as large as in {cause.deviation.peers} peers",
        remedy=remedy.text,
        reference="",
        numbers={"parameters": 0.0, f"weight_deviation:{cause.weight.path}": cause.deviation.size},
        actions=remedy.actions,
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


def _given_broken(measurement: Measurement) -> bool:
    """Whether the first state, which no step has touched, holds NaN or infinity."""
    first = measurement.log_states[:1]
    return bool((np.isnan(first) | np.isposinf(first)).any())


def _input(measurement: Measurement) -> Finding:
    first = measurement.log_states[0]
    samples = np.flatnonzero(np.isnan(first) | np.isposinf(first)).tolist()
    listed = ", ".join(map(str, samples[:8])) + (" ..." if len(samples) > 8 else "")
    step = measurement.steps[0]
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(step.index,),
        module_path=step.module_path,
        confidence=1.0,
        evidence=f"the state before the first step, {step.name}, is NaN or infinite already: "
        f"sample {listed} of {len(first)}",
        remedy="look at the data: no step made these numbers; drop the samples, or mend how they are read or scaled",
        reference="",
        numbers={"samples": float(len(samples))},
    )


def all_finite(measurement: Measurement) -> bool:
    """Whether nothing is NaN or infinite; a gradient of zero is finite."""
    growth = measurement.growth
    if _given_broken(measurement):
        return False
    return not bool((np.isnan(growth) | (growth == math.inf)).any()) and all(
        step.finite and all(weight.finite for weight in step.weights) for step in measurement.steps
    )
