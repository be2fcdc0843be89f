"""Losses that divide by a sum of outputs which may have either sign, such as dice or IoU of logits.

Where that sum is zero the loss jumps from plus to minus infinity. Outputs that are all shifted by one number are looked
at for such a place: shares between 0 and 1 have none, since they cannot be shifted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import LOSS, Action, Finding, of_last_step
from stabkit.diagnosis.losses.ranges import range_of
from stabkit.diagnosis.losses.signs import signs_of
from stabkit.diagnosis.remedies.short_training import compared, short_training
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.training_pass import nodes_above, path_of
from stabkit.vocabulary import moves

_SUMS = moves() | {"Add", "Sub", "Rsub", "Sum", "Mean", "Neg", "Mul"}
_REACH = 4.0  # times their size, or units of a logit, by which outputs are shifted: what a few epochs do to them
_PLACES, _HALVINGS = 41, 40
_HIGH = 1e3  # times what the loss is, from which a place is a pole
_DICE = "Milletari et al., V-Net, 2016: dice of probabilities"


def pole_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a quotient in the loss has a pole among outputs that the model may well give."""
    output = run.done.output
    if run.done.loss is None or not isinstance(output, Tensor) or output.grad_fn is None or output.dim() < 2:
        return []
    if signs_of(output.grad_fn).positive or math.isfinite(range_of(output.grad_fn).low):
        return []
    if not any(_divides_by_sums(node, output.grad_fn) for node in nodes_above(run.done.loss)):
        return []
    place = _pole(run.loss, output.detach())
    if place is None:
        return []
    path, actions = path_of(run.done, output.grad_fn), tuple[Action, ...]()
    evidence = (
        "the loss divides by a sum of outputs that may have either sign, as dice and IoU of logits do: where all "
        f"outputs are shifted by {place:+.3g} that sum is zero, and the loss jumps from plus to minus infinity; "
        f"it is {float(run.done.loss.detach()):.3g} here"
    )
    if path and output.shape[1] == 1:
        actions = ({"action": "activate_after", "module": path, "by": "Sigmoid"},)
        plain, treated = short_training(run.flow, run.loss), short_training(run.flow, run.loss, actions)
        evidence += compared(plain, treated, "with a sigmoid before it", "it")
    return [
        of_last_step(
            run.flow,
            "loss",
            "warning",
            LOSS,
            evidence=evidence,
            remedy="give it probabilities: sigmoid of the logits, or softmax over classes, before this loss",
            reference=_DICE,
            numbers={"shift": place, "loss": float(run.done.loss.detach())},
            actions=actions,
        )
    ]


def _divides_by_sums(node: Node, output: Node) -> bool:
    """Whether an operation divides by sums and differences of what a model returns."""
    parents = [parent for parent, _ in node.next_functions]
    if operation(node) != "Div" or len(parents) < 2 or parents[1] is None:
        return False
    found, stack, seen = False, [parents[1]], set[Node]()
    while stack:
        each = stack.pop()
        if each is output:
            found = True
        elif each not in seen:
            seen.add(each)
            inner = [parent for parent, _ in each.next_functions if parent is not None]
            if operation(each) not in _SUMS or (operation(each) == "Mul" and len(inner) > 1):
                return False
            stack += inner
    return found


def _pole(loss: Callable[[Tensor], Tensor], output: Tensor) -> float | None:
    """By how much outputs are shifted where the loss jumps from one infinity to the other."""
    reach = _REACH * max(1.0, float(output.double().square().mean().sqrt()))

    def value(shift: float) -> float:
        with torch.no_grad():
            return float(loss(output.double() + shift) if doubled else loss(output + shift))

    doubled = True
    try:
        value(0.0)
    except (RuntimeError, ValueError):
        doubled = False
    try:
        level = value(0.0)
        shifts = sorted(torch.linspace(-reach, reach, _PLACES).tolist(), key=abs)
        known = sorted((shift, value(shift) - level) for shift in shifts)
        for (low, below), (high, above) in itertools.pairwise(known):
            if below * above < 0 and (place := _jump(value, level, low, high, below)) is not None:
                return place
    except (RuntimeError, ValueError):
        return None
    return None


def _jump(value: Callable[[float], float], level: float, low: float, high: float, below: float) -> float | None:
    """The place between two at which a loss changes sides, where it does so by way of infinity."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        here = value(middle) - level
        if not math.isfinite(here) or abs(here) > _HIGH * (1 + abs(level)):
            return middle
        low, high = (middle, high) if here * below > 0 else (low, middle)
    return None
