"""Which remedies are tried for a suspect, the likeliest first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from stabkit.diagnosis import remedies
from stabkit.diagnosis.actions import once
from stabkit.diagnosis.chaos import recurrent_matrices
from stabkit.diagnosis.dead_units import drawn_anew
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import Remedy
from stabkit.tracing import Flow, FlowLike, Iteration
from stabkit.vocabulary import activation_of

_BY_INPUT = ("saturated", "dead", "exploding", "vanishing")
_LARGE = math.log(5.0)  # size of the entries of an input from which it is no unit scale, nats
_STRETCH = 3  # steps beyond which a finding is about a stretch


def candidates(suspect: Finding, measurement: Measurement, flow: FlowLike) -> list[Remedy]:
    """Remedies to try, beginning with that of the suspect itself; none changes one weight twice."""
    found = []
    own = Remedy(suspect.remedy, suspect.actions)
    for remedy in [*_unit_input(suspect, measurement), own, *_others(suspect, measurement, flow)]:
        actions = once(flow.model, remedy.actions)
        if actions:
            found.append(Remedy(remedy.text, actions))
    return found


def _unit_input(suspect: Finding, measurement: Measurement) -> list[Remedy]:
    """An input of unit scale, where it is far larger and the suspect is among the first steps."""
    size = float(measurement.log_states[0].mean())
    first = next((w for w in measurement.steps[0].weights if w.kind == "matrix"), None)
    if suspect.kind not in _BY_INPUT or suspect.steps[0] > 1 or not _LARGE < size < math.inf or first is None:
        return []
    rms = math.exp(size)
    text = (
        "standardise the input where the data are read: subtract its mean and divide it by its standard deviation "
        f"(about {rms:.3g})"
    )
    return [Remedy(text, (remedies.scale_input(first.module_path, 1.0 / rms),))] if first.module_path else []


def _others(suspect: Finding, measurement: Measurement, flow: FlowLike) -> list[Remedy]:
    """Further remedies, of dead layers and of stretches."""
    if suspect.kind == "dead":
        return [drawn_anew(suspect.steps, measurement)]
    if len(suspect.steps) <= _STRETCH or suspect.kind not in ("vanishing", "exploding", "chaotic"):
        return []
    if isinstance(flow, Iteration):
        return _rescaled(measurement, flow)
    if suspect.kind != "vanishing" or not isinstance(flow, Flow):
        return []
    steps = [measurement.steps[index] for index in suspect.steps]
    return [remedy for remedy in (_skips(steps, flow), _unbounded(measurement, flow)) if remedy is not None]


def _unbounded(measurement: Measurement, flow: Flow) -> Remedy | None:
    """ReLUs for saturating activations that are modules of their own, with weights drawn for them."""
    modules = dict(flow.model.named_modules())
    places = {
        a.module_path: a
        for step in measurement.steps
        for a in step.activities
        if a.facts.flat_side == "both" and not a.gate and activation_of(modules[a.module_path]) is not None
    }
    if len(places) < 2:
        return None
    kinds = sorted({type(modules[path]).__name__ for path in places})
    matrices = {w.path: w for step in measurement.steps[:-1] for w in step.weights if w.kind == "matrix"}
    actions = [remedies.activate(path, "ReLU") for path in places]
    actions += [remedies.redraw(path, math.sqrt(2.0) / w.unit) for path, w in matrices.items()]
    text = (
        f"use ReLU in the place of {' and '.join(kinds)} ({len(places)} of them), and draw the weights anew for it (He)"
    )
    return Remedy(text, tuple(actions))


def _rescaled(measurement: Measurement, flow: Iteration) -> list[Remedy]:
    """The matrices of a tied map by the factor that its growth asks for, activations and all."""
    growth, paths = float(measurement.growth.sum(axis=0).mean()), list(recurrent_matrices(flow))
    if not math.isfinite(growth) or not paths:
        return []
    by = math.exp(-growth / len(flow))
    text = (
        f"multiply {' and '.join(paths)}, used at every step, by about {by:.3g}: then a step keeps the gradient's size"
    )
    return [Remedy(text, tuple(remedies.scale(path, by) for path in paths))]


def _skips(steps: Sequence[StepMeasurement], flow: Flow) -> Remedy | None:
    """A skip round every layer and the activation behind it, where a Sequential runs them."""
    blocks = [block for block in _blocks(steps, flow) if block[0].space[0] == block[-1].space[1]]
    if len(blocks) < 2:
        return None
    actions = [remedies.add_skip(block[0].module_path, block[-1].module_path) for block in blocks]
    names = sorted({a.operation.lower() for step in steps for a in step.activities if a.facts.flat_side == "both"})
    what = f"each layer with its {' or '.join(names)}" if names else "each layer with its activation"
    return Remedy(
        f"put a skip round {what}, x + f(x): {len(blocks)} blocks, the first at {blocks[0][0].module_path}",
        tuple(actions),
    )


def _blocks(steps: Sequence[StepMeasurement], flow: Flow) -> list[list[StepMeasurement]]:
    """Runs of siblings in a Sequential that begin with a matrix and end before the next."""
    modules = dict(flow.model.named_modules())
    blocks: list[list[StepMeasurement]] = []
    for step in steps:
        parent = step.module_path.rpartition(".")[0]
        if not step.module_path or not isinstance(modules.get(parent), nn.Sequential) or step.merges:
            return []
        heavy = any(weight.kind == "matrix" for weight in step.weights)
        if heavy or not blocks or blocks[-1][0].module_path.rpartition(".")[0] != parent:
            blocks.append([step])
        else:
            blocks[-1].append(step)
    return [block for block in blocks if any(weight.kind == "matrix" for weight in block[0].weights)]
