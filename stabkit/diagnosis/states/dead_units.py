"""Layers whose units are dead or saturated, whatever their peers do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stabkit.diagnosis.blocks.weights import Weight
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.states.activity import Activity
from stabkit.diagnosis.thresholds import Thresholds

_CHANCE = 1e-4  # of so many dead units, or flat entries, in a layer where each is as likely so as not
_LARGE = math.log(2.0)  # size of inputs of an activation from which it is what saturates it, nats
_WIDESPREAD = 0.5  # share of the layers from which a fault is that of the network, not of a layer


def dead_findings(measurement: Measurement, thresholds: Thresholds) -> list[Finding]:
    """Layers in which nearly no unit is ever active; those that only see zeros are not blamed for it."""
    layers = [(step, a) for step in measurement.steps for a in step.activities if step.finite]
    found = [(step, a) for step, a in layers if _is_dead(step, a, thresholds) and not _is_fed_zeros(step, measurement)]
    if not found:
        return []
    widespread = len(found) > max(1, _WIDESPREAD * len(layers))
    groups = [found] if widespread else [[one] for one in found]
    return [_dead(group, measurement) for group in groups]


def _is_dead(step: StepMeasurement, activity: Activity, thresholds: Thresholds) -> bool:
    """Whether more units are dead than chance allows, or all of them, so that nothing passes them."""
    count = round(activity.dead * activity.units)
    stopped = bool(np.isneginf(step.gain).all()) or any(merge.gain == -math.inf for merge in step.merges)
    unlikely = _tail(count, activity.units) < _CHANCE
    return activity.dead >= thresholds.dead and (unlikely or (activity.dead == 1.0 and stopped))


def _tail(count: int, units: int) -> float:
    """Chance of at least ``count`` among ``units`` when each is as likely so as not."""
    if units > 64:
        return 0.0 if count > 0.75 * units else 1.0  # beyond eight standard deviations, or within
    return float(sum(math.comb(units, k) for k in range(count, units + 1)) / 2**units)


def _is_fed_zeros(step: StepMeasurement, measurement: Measurement) -> bool:
    """Whether its units are dead only since the layer before passes nothing."""
    nothing = bool(np.isneginf(measurement.log_states[step.index]).all())
    return nothing and not _low_biases(step.index, measurement)


def _dead(group: Sequence[tuple[StepMeasurement, Activity]], measurement: Measurement) -> Finding:
    step, activity = group[0]
    indices = sorted({s.index for s, _ in group})
    biases = [b for s in dict.fromkeys(indices) for b in _low_biases(s, measurement)]
    home = measurement.steps[biases[0][0]] if biases and len(indices) == 1 else step
    steps = tuple(sorted({*indices, home.index}))
    stopped = np.isneginf(measurement.growth[indices]).any(axis=0)
    evidence = (
        f"{activity.dead:.0%} of the {activity.units} {activity.operation} units of "
        f"{activity.module_path or step.name} pass nothing at any of {activity.observations} observations"
    )
    if len(indices) > 1:
        evidence += f"; so do those of {len(group) - 1} more layers"
    if stopped.any():
        which = "any sample" if stopped.all() else f"{stopped.mean():.0%} of the samples"
        evidence += f"; no gradient gets through for {which}"
    remedy = remedies.lift([bias for _, bias in biases]) if biases else drawn_anew(indices, measurement)
    return Finding(
        kind="dead",
        severity="critical" if stopped.any() else "warning",
        steps=steps,
        module_path=home.module_path,
        confidence=1.0 - min(_tail(round(a.dead * a.units), a.units) for _, a in group),
        evidence=evidence,
        remedy=remedy.text,
        reference="Lu et al., Dying ReLU and initialization, 2019",
        numbers={"dead": activity.dead, "units": float(activity.units), "observations": float(activity.observations)},
        actions=remedy.actions,
    )


def drawn_anew(indices: Sequence[int], measurement: Measurement) -> remedies.Remedy:
    """The layers before dead units as they would be made: weights for a ReLU, biases of zero."""
    before = [w for i in indices for w in _before(i, measurement)]
    drawn = [remedies.redraw(w.path, math.sqrt(2.0) / w.unit) for w in before if w.kind == "matrix"]
    zeroed = [remedies.fill(w.path, 0.0) for w in before if w.kind == "bias"]
    text = (
        "draw the weights before these units anew and set their biases to zero, or use an activation that leaks below "
        "zero; lower the learning rate if a step of training did this"
    )
    return remedies.Remedy(text, (*drawn, *zeroed))


def started_anew(measurement: Measurement) -> remedies.Remedy:
    """All weights as they would be made: what killed some units has usually ruined the layers behind them as well."""
    held = {w.path: w for step in measurement.steps for w in step.weights}
    ends = {w.path for w in measurement.steps[-1].weights}
    matrices = [w for w in held.values() if w.kind == "matrix"]
    drawn = [remedies.redraw(w.path, (1.0 if w.path in ends else math.sqrt(2.0)) / w.unit) for w in matrices]
    own = {w.module_path for w in matrices}
    zeroed = [remedies.fill(w.path, 0.0) for w in held.values() if w.kind == "bias" and w.module_path in own]
    text = (
        f"start again: draw the weights of all {len(drawn)} layers anew (He), set their biases to zero, or go back to "
        "a checkpoint from before, and lower the learning rate if a step of training did this"
    )
    return remedies.Remedy(text, (*drawn, *zeroed))


def _before(index: int, measurement: Measurement) -> list[Weight]:
    """The parameters of a step, or of the nearest one before it that has any."""
    for step in reversed(measurement.steps[: index + 1]):
        if step.weights:
            return list(step.weights)
    return []


def _feeding(step: StepMeasurement, activity: Activity, measurement: Measurement) -> list[Weight]:
    """The matrices right before an activation."""
    own = [w for w in step.weights if w.kind == "matrix" and w.module_path == activity.fed_by]
    return own or [w for w in _before(step.index, measurement)[-2:] if w.kind == "matrix"]


def _low_biases(index: int, measurement: Measurement) -> list[tuple[int, Weight]]:
    """Biases that push the units of a step below zero: of the layer before them, or of a norm in between."""
    for step in reversed(measurement.steps[: index + 1]):
        low = remedies.low_biases(step)
        if low or any(weight.kind == "matrix" for weight in step.weights):
            return [(step.index, bias) for bias in low]
    return []


def saturated_findings(measurement: Measurement, thresholds: Thresholds, blamed: set[int]) -> list[Finding]:
    """Layers of which most outputs lie in the flat ends of their activation, gates apart."""
    layers = [(s, a) for s in measurement.steps for a in s.activities if s.finite and not a.gate and _two_sided(a)]
    found = [(s, a) for s, a in layers if _is_saturated(a, thresholds) and s.index not in blamed]
    if not found:
        return []
    groups = [found] if len(found) > max(1, _WIDESPREAD * len(layers)) else [[one] for one in found]
    return [_saturated(group, measurement) for group in groups]


def _to_unit_size(matrices: Sequence[Weight], measurement: Measurement) -> float | None:
    """The factor that brings what these matrices make of the states before them to size 1, if that is a small one.

    Their gain times the size of the state, or of 1 behind a norm. Where nearly all outputs are saturated their share
    says little of how large the inputs are: 99 % may be 20 times too much or 20,000 times.
    """
    paths = {weight.path for weight in matrices}
    sizes = []
    for step in measurement.steps:
        for weight in step.weights:
            if weight.path in paths:
                state = 0.0 if step.norms else float(measurement.log_states[step.index].mean())
                sizes.append(weight.gains[0] + state)
    largest = max(sizes, default=math.nan)
    return math.exp(-largest) if math.isfinite(largest) and largest > _LARGE else None


def _two_sided(activity: Activity) -> bool:
    return activity.saturated > 0.0


def _is_saturated(activity: Activity, thresholds: Thresholds) -> bool:
    """Whether more entries are flat than chance allows: of three units and two samples, five of six may well be."""
    entries = activity.units * activity.observations
    return activity.saturated >= thresholds.saturated and _tail(round(activity.saturated * entries), entries) < _CHANCE


def _saturated(group: Sequence[tuple[StepMeasurement, Activity]], measurement: Measurement) -> Finding:
    step, activity = max(group, key=lambda pair: pair[1].saturated)
    indices = tuple(sorted({s.index for s, _ in group}))
    share = float(np.mean([a.saturated for _, a in group]))
    feeding = {w.path: w for s, a in group for w in _feeding(s, a, measurement)}
    paths = list(feeding)
    by = _to_unit_size(list(feeding.values()), measurement) or 1.0 / remedies.preactivation_scale(activity.saturated)
    named = " and ".join(paths) if 0 < len(paths) < 3 else "the weights before these activations"
    first, last = measurement.steps[indices[0]], measurement.steps[indices[-1]]
    where = first.name if len(indices) == 1 else f"{first.name} to {last.name}"
    return Finding(
        kind="saturated",
        severity="warning",
        steps=indices,
        module_path=step.module_path,
        confidence=min(1.0, share),
        evidence=f"{share:.0%} of the {activity.operation} outputs of {where} lie where the derivative is below a "
        f"twentieth of its largest; mean log derivative {activity.log_derivative:+.1f}",
        remedy=f"multiply {named} by about {by:.2g}, so that their inputs are of size 1",
        reference="Glorot and Bengio, 2010",
        numbers={"saturated": share, "log_derivative": activity.log_derivative},
        actions=tuple(remedies.scale(path, by) for path in paths),
    )
