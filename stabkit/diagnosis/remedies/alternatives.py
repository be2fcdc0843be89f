"""Which remedies are tried for a suspect, the likeliest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from stabkit.diagnosis.depth.chaos import recurrent_matrices
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs.derivatives import differentiates
from stabkit.diagnosis.inputs.sizes import brought_to_one
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import once
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.states.dead_units import drawn_anew, started_anew
from stabkit.tracing import Flow, FlowLike, Iteration
from stabkit.vocabulary import activation_of

_BY_INPUT = ("saturated", "dead", "exploding", "vanishing")
_LARGE = math.log(5.0)  # size of the entries of an input from which it is no unit scale, nats
_BY_CHANCE = 0.05  # of all draws that leave a layer dead, from which the width is a cause: 30 layers of 9 units
_STRETCH = 3  # steps beyond which a finding is about a stretch


def candidates(
    suspect: Finding, measurement: Measurement, flow: FlowLike, others: Sequence[Finding] = ()
) -> list[Remedy]:
    """Remedies to try, beginning with that of the suspect itself, and ending with those of ``others``.

    None changes one weight twice, and none is tried twice.
    """
    found: list[Remedy] = []
    own, *theirs = (Remedy(each.remedy, each.actions) for each in (suspect, *others))
    for remedy in [*_unit_input(suspect, measurement, flow), own, *_others(suspect, measurement, flow), *theirs]:
        actions = once(flow.model, remedy.actions)
        if actions and all(actions != known.actions for known in found):
            found.append(replace(remedy, actions=actions))
    return found


def _unit_input(suspect: Finding, measurement: Measurement, flow: FlowLike) -> list[Remedy]:
    """An input of unit scale, where it is far larger and the suspect is among the first steps."""
    size = float(measurement.log_states[0].mean())
    first = next((w for w in measurement.steps[0].weights if w.kind == "matrix"), None)
    if suspect.kind not in _BY_INPUT or suspect.steps[0] > 1 or not _LARGE < size < math.inf:
        return []
    if first is None or not first.module_path:
        return []
    rms = math.exp(size)
    inside = isinstance(flow, Flow) and differentiates(flow.forward_pass)
    return [Remedy(brought_to_one(rms, inside=inside), (remedies.scale_input(first.module_path, 1.0 / rms),))]


def _others(suspect: Finding, measurement: Measurement, flow: FlowLike) -> list[Remedy]:
    """Further remedies, of dead layers and of stretches."""
    if suspect.kind == "dead":
        return [drawn_anew(suspect.steps, measurement), started_anew(measurement), *_smooth(measurement, flow)]
    if suspect.kind == "rank_collapse":
        return _short_skips(suspect, measurement)
    if suspect.kind == "saturated":
        return _by_share(suspect, measurement)
    if len(suspect.steps) <= _STRETCH or suspect.kind not in ("vanishing", "exploding", "chaotic"):
        return []
    if isinstance(flow, Iteration):
        return _rescaled(measurement, flow)
    if suspect.kind != "vanishing" or not isinstance(flow, Flow):
        return []
    steps = [measurement.steps[index] for index in suspect.steps]
    tries = (_skips(steps, flow) or _skips_of_peers(steps), _unbounded(measurement, flow), deep_norm(steps))
    return [remedy for remedy in tries if remedy is not None]


def _short_skips(suspect: Finding, measurement: Measurement) -> list[Remedy]:
    """Skips round the blocks, with branches so much smaller that many of them add up to the size of one."""
    places = [action["module"] for action in suspect.actions if action["action"] == "add_skip"]
    held = {path: _held_by(path, measurement) for path in places}
    last = {path: names[-1] for path, names in held.items() if names}
    if len(last) < 2:
        return []
    by = len(last) ** -0.5
    actions = [remedies.add_skip(path) for path in places]
    # behind the skip the block is called by another name
    actions = [*(remedies.scale(name, by) for name in last.values()), *actions]
    text = (
        f"give every block a skip, x + f(x), and let f begin {by:.2g} times as large, 1/sqrt(depth): multiply the "
        f"last matrix of each of the {len(last)} blocks by it"
    )
    return [Remedy(text, tuple(actions))]


def _held_by(module: str, measurement: Measurement) -> list[str]:
    """The matrices of a module, in the order in which they run."""
    weights = [w for step in measurement.steps for w in step.weights if w.kind == "matrix"]
    return [w.path for w in weights if w.path.startswith(f"{module}.")]


def _by_share(suspect: Finding, measurement: Measurement) -> list[Remedy]:
    """The matrices before saturated units by what the share of those would ask for, were their inputs normal."""
    paths = [action["parameter"] for action in suspect.actions if action["action"] == "scale"]
    share = max((a.saturated for i in suspect.steps for a in measurement.steps[i].activities), default=0.0)
    if not paths or share <= 0.0:
        return []
    by = 1.0 / remedies.preactivation_scale(share)
    named = " and ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
    text = f"multiply {named} by about {by:.2g}: then few are saturated"
    return [Remedy(text, tuple(remedies.scale(path, by) for path in paths))]


def scaled_skips(remedy: Remedy) -> Remedy | None:
    """Skips whose branches weigh 1/sqrt(depth), so that all of them add up to the size of one; None for other remedies.

    At full strength the variance of a state doubles with every block, and a loss of it begins far too high.
    """
    if len(remedy.actions) < 2 or any(a["action"] != "add_skip" or "factor" in a for a in remedy.actions):
        return None
    by = float(f"{len(remedy.actions) ** -0.5:.2g}")
    actions = tuple({**action, "factor": by} for action in remedy.actions)
    return replace(remedy, text=remedy.text.replace("x + f(x", f"x + {by:g} f(x"), actions=actions)


def _unbounded(measurement: Measurement, flow: Flow) -> Remedy | None:
    """ReLUs for saturating activations that are modules of their own, with weights drawn for them.

    Not where the model takes derivatives: a second one of a ReLU is zero.
    """
    if any(name.endswith("Backward") for step in flow.steps for name in step.operations):
        return None
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


def _smooth(measurement: Measurement, flow: FlowLike) -> list[Remedy]:
    """An activation that dies nowhere for ReLUs of narrow layers, of which whole ones are dead by chance of the draw.

    That of a layer of n units is 2^-n or more (Lu et al., 2019).
    """
    if not isinstance(flow, Flow):
        return []
    modules = dict(flow.model.named_modules())
    held = [a for step in measurement.steps for a in step.activities if a.operation == "Relu" and not a.gate]
    narrow = {a.module_path: a.units for a in held if isinstance(modules.get(a.module_path), nn.ReLU)}
    alive = math.prod(1.0 - 2.0**-units for units in narrow.values())
    if len(narrow) < 2 or alive > 1.0 - _BY_CHANCE:
        return []
    units = sorted(narrow.values())
    cause = (
        f"a layer of n ReLUs is dead for all inputs with a chance of about 2^-n as its weights are drawn: of these "
        f"{len(narrow)} of {units[0]}{f' to {units[-1]}' if units[-1] > units[0] else ''} units one is so in "
        f"{1 - alive:.0%} of all draws, and what is behind it is one constant"
    )
    matrices = {w.path: w for step in measurement.steps for w in step.weights if w.kind == "matrix"}
    actions = [remedies.activate(path, "ELU") for path in narrow]
    actions += [remedies.orthogonalise(path, 1.0) for path in matrices]
    text = (
        f"make the layers wider, or use an activation that is flat nowhere, as nn.ELU, in the place of all "
        f"{len(narrow)} ReLUs, with orthogonal weights; to draw them again may do by luck"
    )
    return [Remedy(text, tuple(actions), cause=cause)]


def deep_norm(steps: Sequence[StepMeasurement]) -> Remedy | None:
    """DeepNorm's alpha for blocks whose norms stand behind the additions.

    A norm does not see the scale of what it is given, so LN(alpha x + f(x)) is LN(x + f(x) / alpha): alpha is put into
    the last matrix of every branch.
    """
    behind = [step for step in steps if step.merges and step.renormalised]
    branches = remedies.branch_matrices(behind)
    if 2 * len(behind) < len(steps) or len(branches) < 2:
        return None
    alpha = len(branches) ** 0.25  # DeepNorm's (2 N)^(1/4), of N layers with two branches each
    biases = {w.module_path: w.path for step in behind for w in step.weights if w.kind == "bias"}
    paths = [path for path, _ in branches]
    paths += [biases[path.rpartition(".")[0]] for path in paths if path.rpartition(".")[0] in biases]
    text = (
        f"let the skips weigh more: LN(alpha x + f(x)) with DeepNorm's alpha = (2N)^(1/4) = {alpha:.3g}, which is the "
        f"same as to multiply the last matrix of every branch and its bias by {1 / alpha:.3g}"
    )
    return Remedy(text, tuple(remedies.scale(path, 1.0 / alpha) for path in paths))


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


def _skips_of_peers(steps: Sequence[StepMeasurement]) -> Remedy | None:
    """A skip round every layer of a class that keeps its space, wherever the code of the model runs it."""
    classes = {step.module_class for step in steps if step.module_path}
    if len(steps) < 2 or len(classes) != 1 or any(step.merges or step.space[0] != step.space[1] for step in steps):
        return None
    (name,) = classes
    paths = dict.fromkeys(step.module_path for step in steps)
    if "" in paths or len(paths) < len(steps):
        return None
    return Remedy(
        f"put a skip round each {name}, x + f(x, ...): {len(paths)} of them, the first at {steps[0].module_path}",
        tuple(remedies.add_skip(path) for path in paths),
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
