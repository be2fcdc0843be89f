"""Losses that cannot fall far, since the output is held within a range: of logits, or beside the targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stabkit.diagnosis.finding import LOSS, Action, Finding, of_last_step, serious
from stabkit.diagnosis.losses.binary_cross_entropies import BinaryCrossEntropy, binary_cross_entropies
from stabkit.diagnosis.losses.loud_logits import CrossEntropy, cross_entropies
from stabkit.diagnosis.losses.ranges import Range, range_of
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.short_training import compared, short_training, worse
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing import Flow
from stabkit.tracing.recording.training_pass import path_of
from stabkit.vocabulary import activation_of

_HIGH = 0.2  # of the loss of equal chances: a floor from which logits are held in too narrow a range
_LOW = 0.01  # of the loss of equal chances: a floor that is none
_UNREACHED = 0.05  # of the variance of the targets, from which what lies out of reach is no noise
_BINARY = "binary_cross_entropy_with_logits"
_COSINES = "Wang and Liu, Understanding the behaviour of contrastive loss, 2021; Radford et al., CLIP, 2021"
_OUTPUTS = "Goodfellow, Bengio and Courville, Deep learning, 2016, section 6.2.2"


def loss_floor_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """What keeps a loss from falling: logits in a narrow range, targets out of reach.

    What is found of a loss otherwise, that it is taken of probabilities above all, says more.
    """
    if run.done.loss is None or any(finding.kind == "loss" and serious(finding) for finding in others):
        return []
    for found in cross_entropies(run.done.loss):
        held = range_of(found.softmax.next_functions[0][0])
        if held.node is not None and math.isfinite(held.width):
            floor = _floor(found, held)
            if floor > _HIGH * found.chance:
                return [_narrow(run, found, held, floor)]
        elif held.node is not None and held.low == 0 and activation_of(held.node) is not None:
            return _no_sign(run, found, held)
    for binary in binary_cross_entropies(run.done.loss):
        held = range_of(binary.node)
        if held.node is not None and binary.floor(held) > _HIGH * binary.chance:
            return [_one_sided(run, binary, held)]
    for found_here in regressions(run.done):
        held = range_of(found_here.node)
        if held.node is not None:
            return _out_of_reach(run, held, found_here.targets)
    return []


def _floor(found: CrossEntropy, held: Range) -> float:
    """The least cross entropy of logits within a range.

    Of cosines where every class is the right one once, all others cannot be opposite at a time: the least has the
    vectors at the corners of a simplex. By convexity of log(1 + (n - 1) exp(d)) in the mean difference d.
    """
    classes, difference = found.classes, held.width
    if held.words == "cosines" and _contrastive(found):
        difference = held.width / 2 * classes / (classes - 1)
    return math.log1p((classes - 1) * math.exp(-difference))


def _contrastive(found: CrossEntropy) -> bool:
    """Whether every class is the right one once: each sample is told from all others."""
    return len(found.labels) == found.classes == len(set(found.labels.tolist()))


def _narrow(run: TrainingRun, found: CrossEntropy, held: Range, floor: float) -> Finding:
    path = path_of(run.done, held.node)
    named = {name: p for name, p in run.call.module.named_parameters() if any(p is scale for scale in held.scales)}
    scale = next(iter(named), "")
    value = float(named[scale].detach()) if scale else math.nan
    bounded = f"{held.words}{f' in {path}' if path else ''}" + (f" times {scale}, {value:.3g}," if scale else "")
    evidence = (
        f"the logits of the cross entropy are {bounded} within {held.low:.3g} to {held.high:.3g}: it cannot fall below "
        f"{floor:.3g}{f' while {scale} is that' if scale else ''}; equal chances of {found.classes} classes cost "
        f"{found.chance:.3g}"
    )
    severity, actions = "warning", tuple[Action, ...]()
    remedy = f"take the {held.words} away before the loss, or multiply by a scale that is trained"
    if scale:
        factor = _factor(found, held)
        actions = (remedies.scale(scale, factor),)
        plain, treated = short_training(run.flow, run.loss), short_training(run.flow, run.loss, actions)
        evidence += compared(plain, treated, "treated")
        if plain is not None and treated is not None:
            severity = "warning" if treated.last < plain.last else "info"
        remedy = (
            f"start {scale} at {factor * value:.2g} or more; where it is meant as a logarithm, multiply by its exp, "
            "as CLIP does (1/0.07 = 14.3)"
        )
    elif held.words == "cosines":
        severity = "info"  # a temperature that was chosen: contrastive losses are trained far above zero
        remedy = "none is needed where the temperature is meant; a smaller one lets the loss fall further"
    numbers = {"floor": floor, "chance": found.chance, "low": held.low, "high": held.high}
    return of_last_step(run.flow, "loss", severity, path or LOSS, evidence, remedy, _COSINES, numbers, actions)


def _factor(found: CrossEntropy, held: Range) -> float:
    """What the range is to be multiplied with so that the floor is as good as none."""
    needed = math.log((found.classes - 1) / math.expm1(_LOW * found.chance))
    return needed / -math.log(math.expm1(_floor(found, held)) / (found.classes - 1))


def _out_of_reach(run: TrainingRun, held: Range, targets: Tensor) -> list[Finding]:
    wanted = targets.double()
    nearest = wanted.clamp(held.low, held.high)
    spread = float((wanted - wanted.mean()).square().mean())
    missed = float((wanted - nearest).square().mean())
    if not missed > _UNREACHED * spread:
        return []
    share = float((wanted != nearest).double().mean())
    path = path_of(run.done, held.node)
    ends = f"{float(wanted.min()):.3g} to {float(wanted.max()):.3g}"
    evidence = (
        f"the output is that of a {held.words}{f' ({path})' if path else ''}, within {held.low:.3g} to "
        f"{held.high:.3g}, and {share:.0%} of its targets, which go from {ends}, lie beyond: the nearest that it can "
        f"give leaves a mean squared error of {missed:.3g}, where the mean of the targets leaves {spread:.3g}"
    )
    actions, trained = _without(run.flow, run.loss, path, held.words)
    evidence += trained
    remedy = f"take the {held.words} at the end away, or bring the targets into its range"
    numbers = {"outside": share, "missed": missed, "spread": spread}
    return [of_last_step(run.flow, "loss", "warning", path or LOSS, evidence, remedy, _OUTPUTS, numbers, actions)]


def _one_sided(run: TrainingRun, binary: BinaryCrossEntropy, held: Range) -> Finding:
    path, floor = path_of(run.done, held.node), binary.floor(held)
    evidence = (
        f"the logits of {_BINARY} are those of a {held.words}{f' ({path})' if path else ''}, within {held.low:.3g} "
        f"to {held.high:.3g}: with these targets it cannot fall below {floor:.3g}; their mean for all costs "
        f"{binary.chance:.3g}"
    )
    actions, trained = _without(run.flow, run.loss, path, held.words)
    remedy = f"take the {held.words} before the loss away: logits go from minus to plus infinity"
    numbers = {"floor": floor, "chance": binary.chance, "low": held.low, "high": held.high}
    evidence += trained
    return of_last_step(run.flow, "loss", "warning", path or LOSS, evidence, remedy, _OUTPUTS, numbers, actions)


def _no_sign(run: TrainingRun, found: CrossEntropy, held: Range) -> list[Finding]:
    """Logits that an activation keeps from going below zero: told where training gains without it."""
    path = path_of(run.done, held.node)
    actions, trained = _without(run.flow, run.loss, path, held.words)
    if not actions or not worse(short_training(run.flow, run.loss), short_training(run.flow, run.loss, actions)):
        return []
    evidence = (
        f"the logits of the cross entropy are those of a {held.words} ({path}), none below zero: a class whose score "
        f"it cuts off gets no gradient{trained}"
    )
    remedy = f"take the {held.words} before the loss away: logits go from minus to plus infinity"
    numbers = {"chance": found.chance}
    return [of_last_step(run.flow, "loss", "warning", path or LOSS, evidence, remedy, _OUTPUTS, numbers, actions)]


def _without(flow: Flow, loss: Any, path: str, words: str) -> tuple[tuple[Action, ...], str]:
    """The action that takes an activation away, and what training gains by it."""
    module = dict(flow.model.named_modules()).get(path) if path else None
    if not isinstance(module, nn.Module) or activation_of(module) is None:
        return (), ""
    actions: tuple[Action, ...] = ({"action": "activate", "module": path, "by": "Identity"},)
    plain, treated = short_training(flow, loss), short_training(flow, loss, actions)
    return actions, compared(plain, treated, f"without the {words}")  # no verdict: so few steps do not reach a floor
