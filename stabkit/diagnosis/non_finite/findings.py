"""States and gradients that are not finite, and where that begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from torch.autograd.graph import Node

from stabkit.diagnosis.blocks.weight_faults import WeightFault, weight_faults
from stabkit.diagnosis.blocks.weights import role_of
from stabkit.diagnosis.finding import LOSS, Finding, as_fact
from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.non_finite.origin import Origin, origin_of
from stabkit.diagnosis.non_finite.trials import guarded
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import factor
from stabkit.tracing import Flow, FlowLike
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.flow import engine_vjp
from stabkit.tracing.graph.values import entries_are_finite, operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.inputs import differentiable
from stabkit.tracing.recording.training_pass import nodes_above, training_pass

_LARGE = math.log(4.0)  # of entries beside those of gain 1: twice what He's rule draws, and more, nats
#: operations at which such a softmax is not finite first
BEGINS = frozenset({"exp", "div", "log", "exp2"})


def non_finite_findings(
    flow: FlowLike, measurement: Measurement, thresholds: Thresholds, loss: object = None
) -> list[Finding]:
    """An input or a weight that is not finite; else the first operation whose result, or whose derivative, is not.

    Where states overflow, a weight before that is far larger than in its peers is named as the cause.
    """
    if _given_broken(measurement):
        return [_input(measurement)]
    steps = measurement.steps
    poisoned = [step for step in steps if any(not weight.finite for weight in step.weights)]
    broken = [step for step in steps if not step.finite]
    lost = np.isnan(measurement.growth) | np.isposinf(measurement.growth)
    backward = [int(i) for i in np.flatnonzero(lost.any(axis=1))]
    origin = origin_of(flow.forward_pass, loss) if isinstance(flow, Flow) else None
    if origin is not None and not origin.cause.given:
        first = _first_of(origin, flow, steps)
        if not poisoned or first.index < poisoned[0].index:
            heavy = _heavy_weight(steps, origin, first, thresholds)
            return [_located(origin, first, backward, heavy, measurement, flow, loss)]
    if origin is not None and broken and not poisoned:  # what was given is a parameter or a constant
        return [_located(origin, _first_of(origin, flow, steps), backward, None, measurement, flow, loss)]
    if broken or poisoned:
        first = min([*broken, *poisoned], key=lambda step: step.index)
        cause = None if first in poisoned else _heavy_weight(steps, None, first, thresholds)
        where_else = tuple(sorted({first.index, *backward}))
        return [
            _forward(first, where_else) if cause is None else _overflow(first, steps[cause.step], cause, where_else)
        ]
    if backward:
        return [_backward(steps[max(backward)], backward)]  # the gradient travels from the last step to the first
    if origin is not None:  # of what was given, on no way from the input to the output
        return [_located(origin, _first_of(origin, flow, steps), backward, None, measurement, flow, loss)]
    if isinstance(flow, Flow) and loss is not None and not _finite_loss(flow, loss):
        return [_unfollowed(steps[-1])]
    return []


def _first_of(origin: Origin, flow: FlowLike, steps: Sequence[StepMeasurement]) -> StepMeasurement:
    where = _step_of(origin, flow) if isinstance(flow, Flow) else 0
    return steps[min(where, len(steps) - 1)]


def finite_end(flow: FlowLike, loss: object = None) -> bool:
    """Whether the loss is finite; without one, whether all that the model returns is."""
    if not isinstance(flow, Flow):
        return True  # an iterated map returns its states
    if loss is not None:
        return _finite_loss(flow, loss)
    return all(entries_are_finite(t) for _, t in named_tensors(flow.output) if differentiable(t))


def _finite_loss(flow: Flow, loss: object) -> bool:
    return bool(scalar_loss(loss, flow.output).detach().isfinite())


def _unfollowed(step: StepMeasurement) -> Finding:
    """A loss that is not finite for a reason that no watched operation shows."""
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(step.index,),
        module_path=LOSS,
        confidence=1.0,
        evidence="the loss is NaN or infinite, and no operation of torch that was watched makes it so: a number from "
        "outside of it does, or the pass is another each time",
        remedy="print what the loss is made of, its terms and its constants, and look which is not finite",
        reference="",
    )


def _heavy_weight(
    steps: Sequence[StepMeasurement], origin: Origin | None, first: StepMeasurement, thresholds: Thresholds
) -> WeightFault | None:
    """A weight up to some step that is far larger than its peers, where the range of a dtype is left."""
    if origin is not None and (origin.backward or origin.part == "loss" or not origin.cause.numbers.get("limit")):
        return None
    faults = weight_faults(steps, thresholds)
    return next((f for f in faults if f.step <= first.index and f.deviation.size > 0), None)


def _step_of(origin: Origin, flow: Flow) -> int:
    """The step in which an operation stands; the last for the loss."""
    last = len(flow.steps) - 1
    calls = flow.recorded.recording.calls
    if origin.part == "loss" or not 0 <= origin.call < len(calls):
        return last if origin.part == "loss" else 0
    call = calls[origin.call]
    time = call.stop if origin.ended else call.start
    position = flow.recorded.graph.position(time)
    return next((step.index for step in flow.steps if position < step.target.position), last)


def _located(
    origin: Origin,
    step: StepMeasurement,
    backward: Sequence[int],
    heavy: WeightFault | None,
    measurement: Measurement,
    flow: FlowLike,
    loss: object,
) -> Finding:
    """The finding on the operation at which it began, with the weight that drives it there.

    What was tried and keeps the operation finite whatever the weights are is told before what makes weights smaller.
    """
    remedy, text = remedies.Remedy(origin.cause.remedy), origin.cause.text
    if origin.also:
        text += f"; the same in {listed(origin.also)}"
    if origin.fed_by and not _within(origin.path, origin.fed_by):
        text += f"; the layer before it is {origin.fed_by}"
    numbers = dict(origin.cause.numbers)
    path = LOSS if origin.part == "loss" else origin.path  # empty in code of the outermost module
    home = step
    if heavy is not None:
        home = measurement.steps[heavy.step]
        far = heavy.deviation
        text += f"; {heavy.weight.path} is {factor(far.size)} times as large as in {far.peers} peers"
        brought = remedies.to_peers([heavy])
        remedy = remedies.Remedy(f"{brought.text}; or {origin.cause.remedy}", brought.actions)
        numbers[f"weight_deviation:{heavy.weight.path}"] = far.size
        path = home.home([heavy.weight])
    elif (drawn := _drawn_anew(origin, flow.model)) is not None:
        remedy = drawn
    else:
        stable = stable_softmax(flow, loss) if isinstance(flow, Flow) and origin.operation in BEGINS else ""
        tried = guarded(flow, loss, origin) if isinstance(flow, Flow) and not stable else None
        by_hand = stable or (origin.cause.remedy if tried is None else tried.words)
        # smaller weights bound nothing: they are the remedy where they are too large, or nothing else is known to help
        smaller = _smaller_exponent(origin, measurement, by_hand)
        if smaller is not None and ((tried is None and not stable) or _is_large(origin, measurement)):
            remedy = smaller
        else:
            remedy = remedies.Remedy(by_hand)
        text += "" if tried is None else f"; {tried.evidence}"
    what = "the first derivative that is not finite, on the way back, is that of" if origin.backward else "begins at"
    what = "comes in at" if origin.cause.given else what
    also = tuple(i for i in backward if i != home.index) if origin.backward or heavy is not None else ()
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(home.index, *also),
        module_path=path,
        confidence=1.0,
        evidence=f"{what} {origin.place}: {text}",
        remedy=remedy.text,
        reference="Goldberg, What every computer scientist should know about floating-point arithmetic, 1991",
        numbers=numbers,
        actions=remedy.actions,
    )


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _drawn_anew(origin: Origin, model: object) -> remedies.Remedy | None:
    """The parameter whose zeros are divided by, drawn anew at the size that a layer of its shape starts with.

    Where only some of its rows are zero, the others have perhaps been trained, and are left alone.
    """
    if not origin.parameter or not isinstance(model, nn.Module):
        return None
    held = dict(model.named_parameters()).get(origin.parameter)
    if held is None or bool(held.detach().any()):
        return None
    by = (3.0 * max(1, math.prod(held.shape[1:]))) ** -0.5
    return remedies.Remedy(origin.cause.remedy, (remedies.redraw(origin.parameter, by),))


def _is_large(origin: Origin, measurement: Measurement) -> bool:
    """Whether the matrix before an operation is far larger than one that is drawn by any of the usual rules."""
    weights = [w for step in measurement.steps for w in step.weights if w.module_path == origin.fed_by]
    return any(w.kind == "matrix" and w.finite and w.gains[0] > _LARGE for w in weights)


def _smaller_exponent(origin: Origin, measurement: Measurement, by_hand: str) -> remedies.Remedy | None:
    """The layer that makes the argument of an exponential, and its like in other blocks, made small."""
    argument = origin.cause.numbers.get("argument", 0.0)
    if origin.backward or not origin.fed_by or not argument > 1.0:
        return None
    held = {w.path: w for step in measurement.steps for w in step.weights if w.finite}
    like = role_of(f"{origin.fed_by}.weight")
    homes = {w.module_path for w in held.values() if w.kind == "matrix" and w.role == like}
    actions = [remedies.scale(path, 1.0 / argument) for path, w in held.items() if w.module_path in homes]
    if not actions:
        return None
    many = f" and the {len(homes) - 1} like it in other blocks" if len(homes) > 1 else ""
    text = f"multiply {origin.fed_by}{many}, biases too, by {1.0 / argument:.3g}; or {by_hand}"
    return remedies.Remedy(text, tuple(actions))


def _forward(step: StepMeasurement, where: tuple[int, ...]) -> Finding:
    poisoned = [weight for weight in step.weights if not weight.finite]
    bad = [weight.path for weight in poisoned]
    name = step.name
    if bad:
        evidence = f"{', '.join(bad)} of {name} {'is' if len(bad) == 1 else 'are'} NaN or infinite"
        remedy = f"go back to a checkpoint before {', '.join(bad)} became so, or draw anew"
    else:
        evidence = f"the state behind {name} is NaN or infinite, and the one before it is not"
        remedy = f"look at what {step.module_path or name} computes: the first number that is not finite is made there"
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
        remedy=f"look at the derivatives in {step.module_path or step.name}: one that is not finite is taken there",
        reference="",
        numbers={"steps": float(len(where))},
    )


def is_finite(flow: Flow, loss: object = None) -> bool:
    """Whether all states and one gradient of a flow are finite: one backward pass, if the trace did not see it."""
    if not all(entries_are_finite(tensor) for state in flow.states for tensor in state.tensors):
        return False
    if loss is not None and not _finite_loss(flow, loss):
        return False
    if loss is None and flow.passes_finite is not None:
        return flow.passes_finite
    with flow.recorded.graph.way_back:
        pulled = engine_vjp(flow.states[-1].values, flow.states[0].values, flow.cotangent(loss))
    return all(map(entries_are_finite, pulled))


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


def reach_no_parameter(flow: Flow, loss: Any) -> bool:
    """Whether the loss and the gradients of all parameters are finite, and nobody asks for that of an input.

    Args:
        flow: the traced pass, whose gradients are not finite at some state.
        loss: a callable on the output that returns a scalar.
    """
    call = replace(flow.forward_pass, through_no_grad=False)
    if any(t.requires_grad for _, t in call.given):
        return False
    done = training_pass(call, loss)
    found = [g for g in done.gradients.values() if g is not None]
    return bool(found) and done.loss is not None and all(map(entries_are_finite, [done.loss.detach(), *found]))


def as_facts(findings: list[Finding]) -> list[Finding]:
    """The same as facts: training does not meet them."""
    met = "no parameter lies before it and the gradients of all parameters are finite, so training does not meet it"
    remedy = "none is needed to train; for gradients of the input"
    return [as_fact(finding, met, f"{remedy}: {finding.remedy}") for finding in findings]


def stable_softmax(flow: Flow, loss: Any) -> str:
    """What computes a softmax that is written out without leaving the range of its dtype; empty where there is none."""
    if loss is not None:
        nodes = set(nodes_above(scalar_loss(loss, flow.output)))
    else:
        nodes = {node for _, t in named_tensors(flow.output) if t.requires_grad for node in nodes_above(t)}
    written = {node for node in nodes if _is_softmax(node)}
    if not written:
        return ""
    if any(operation(node) == "Log" and _comes_from(node, written) for node in nodes):
        return "the logarithm of a softmax is written out: take log_softmax of the scores in place of exp, sum and log"
    return "a softmax is written out: take torch.softmax of the scores, which subtracts the largest of them first"


def _is_softmax(node: Any) -> bool:
    """Whether a node divides an exponential by its own sum."""
    parents = [parent for parent, _ in node.next_functions]
    if operation(node) != "Div" or len(parents) < 2:
        return False
    over, under = behind_moves(parents[0]), behind_moves(parents[1])
    while under is not None and _keeps_from_zero(under):
        under = behind_moves(next((p for p, _ in under.next_functions if p is not None), None))
    if over is None or under is None or not operation(over).startswith("Exp") or operation(under) != "Sum":
        return False
    return behind_moves(under.next_functions[0][0]) is over


def _comes_from(node: Any, written: Iterable[Node]) -> bool:
    inner = behind_moves(node.next_functions[0][0])
    while inner is not None and _keeps_from_zero(inner):
        inner = behind_moves(next((p for p, _ in inner.next_functions if p is not None), None))
    return inner is not None and inner in set(written)


def _keeps_from_zero(node: Node) -> bool:
    """Whether it may be what is added, or a clamp, that keeps a number from zero."""
    return operation(node) == "Add" or operation(node).startswith("Clamp")
