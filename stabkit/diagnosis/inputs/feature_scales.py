"""Inputs whose features have very different sizes, or lie far from zero beside their spread.

The curvature of the first layer is the second moment of its input, the square of a size. Features of size 1e5 beside
others of 0.01, or years around 2000, give it one direction that bounds the rate and others in which nothing moves at
that rate. What counts is what the first matrix is given, whatever integers were cast and joined before it. Tried by
training for a few steps on the inputs as they are and on standardised ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import LEARNT, Finding
from stabkit.diagnosis.inputs.derivatives import differentiates
from stabkit.diagnosis.inputs.features import OFFSET, Features, changed, features_of
from stabkit.diagnosis.inputs.first_matrices import Given, given_to_matrices, inputs_behind, standardised
from stabkit.diagnosis.remedies.held_out import learnt
from stabkit.diagnosis.remedies.short_training import STEPS, short_training
from stabkit.diagnosis.remedies.slow_starts import SLOWLY, MoreSteps, more_steps
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after, sgd
from stabkit.diagnosis.states.batch_statistics import with_norms_of_evaluation
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing import Flow
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass

# of the loss: in the four cases that are tested 20 steps on standardised inputs leave .04 of it, on the inputs as they
# are .86 and more, and behind a norm that standardises .03; labels that nothing tells leave .8, or .3 where they are
# learnt by heart. The noise that a model of diffusion is asked for leaves .34, and 1.3 where the step number swamps it
_LEARNS = 0.25  # what few steps on standardised inputs must get below, or half of the others and not by heart
_DOES_NOT = 0.5  # what the same steps on the inputs as they are must stay above
_REFERENCE = "LeCun, Bottou, Orr and Müller, Efficient backprop, 1998, sections 4.3 and 5.1"


def feature_scale_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a few steps learn from standardised inputs and not from those that are given."""
    if run.done.loss is None or with_norms_of_evaluation(run.call.module) or differentiates(run.call, run.loss):
        return []
    found = {id(t): f for name, t in run.call.given if (f := features_of(run.flow, name, t)) is not None and f.far}
    places = [place for place in given_to_matrices(run.call) if place.features.far]
    if not (found or places):
        return []
    first = float(run.done.loss.detach())
    if found:
        other = changed(run.call, lambda t: found[id(t)].standardised(t) if id(t) in found else t)
        worst = max(found.values(), key=lambda f: f.apart)
        if (trial := _tried(run, other, first)) is not None:
            return [_finding(worst, trial, f"the input {worst.name!r}", run.flow, "")]
    if places and (trial := _tried(run, standardised(run.call, places), first)) is not None:
        return [_of_matrix(run.flow, run.call, max(places, key=lambda place: place.features.apart), trial)]
    return []


@dataclass(frozen=True)
class _Trial:
    """Losses before and after a few steps, as it is and with standardised inputs."""

    first: float
    plain: float
    start: float
    cured: float
    later: MoreSteps


def _tried(run: TrainingRun, other: ForwardPass, first: float) -> _Trial | None:
    """What a few steps learn from a call and from one whose inputs are standardised, where that is clearly more."""
    call, loss = run.call, run.loss
    if evaluated(other, training=True).output is None:  # a model that reads indices off its inputs takes no others
        return None
    fresh = training_pass(other, loss, differentiate=False).loss
    if fresh is None or not float(fresh.detach()) > 0:
        return None
    start = float(fresh.detach())
    cured = _end(other, loss, start)
    if not cured < _DOES_NOT * start:
        return None
    plain = _end(call, loss, first)
    if plain > _DOES_NOT * start and (trained := short_training(call, loss)) is not None:
        plain = min(plain, trained.last)
    if not (plain > _DOES_NOT * start and cured < _DOES_NOT * plain):
        return None
    if not cured < _LEARNS * start:  # the rest may be noise, or what was learnt by heart
        others = learnt(other, loss, STEPS)
        if others is None or not others.other > _LEARNS:
            return None
    later = more_steps(call, loss, lambda by, steps: left_after(other, loss, by, steps=steps), run.optimizer)
    return _Trial(first, plain, start, cured, later)


def _end(call: ForwardPass, loss: Any, first: float) -> float:
    """The loss after a few steps, at the best of the usual optimizers."""
    left = [left_after(call, loss, [by(rate) for rate in RATES]) for by in (adam, sgd)]
    known = [share for share in left if share is not None]
    return min(known) * first if known else math.nan


def _of_matrix(flow: Flow, call: ForwardPass, place: Given, trial: _Trial) -> Finding:
    """A finding on what the first matrix is given, with the input that it comes from."""
    features, index = place.features, place.features.farthest
    column = place.rows[:, index]
    behind = inputs_behind(call, place, index)
    names = " and ".join(repr(name) for name, _ in behind)
    comes = f", of which feature {index} comes from {names}" if behind else ""
    told = _finding(features, trial, f"what {place.path} is given{comes},", flow, place.path)
    if trial.later.slow:
        return told
    mean, spread = float(features.mean[index]), float(features.spread[index])
    whose = f"feature {index} of what {place.path} is given" + (f", from {names}," if behind else "")
    remedy = (
        f"bring {whose} to the size of the others before they are joined: subtract {mean:.3g} and divide by "
        f"{spread:.3g}, numbers that go with the model"
    )
    if float(column.min()) >= 0 and not abs(mean) > OFFSET * spread:
        remedy += f", or divide by its largest value, {float(column.max()):.4g}"
    if any(not t.is_floating_point() for _, t in behind):
        remedy += "; or embed it: sines of it as of positions, or nn.Embedding where it has few values"
    return replace(told, remedy=remedy)


def _finding(features: Features, trial: _Trial, whose: str, flow: Flow, path: str) -> Finding:
    apart, offset = features.apart, features.offset
    several, largest = len(features.mean) > 1, float(features.sizes.max())
    sizes = f"sizes up to {apart:.3g} times apart" if several else f"the size {largest:.3g}"
    evidence = (
        f"the features of {whose} have {sizes} and means up to {offset:.3g} spreads from zero (by "
        f"feature, mean and spread: {features.words}), and the curvature of the first layer along each goes with the "
        f"square of its size; tried on a copy, {STEPS} steps of SGD and Adam at "
        f"{' or '.join(f'{rate:g}' for rate in RATES)} take the loss from {trial.first:.3g} to {trial.plain:.3g} at "
        f"best, and with standardised inputs from {trial.start:.3g} to {trial.cured:.3g}{trial.later}"
    )
    return Finding(
        kind="input_scale",
        severity="info" if trial.later.slow else "warning",
        steps=(step_of(flow, path) if path else 0,),
        module_path=path or flow.steps[0].module_path,
        confidence=1.0,
        evidence=evidence,
        remedy=SLOWLY
        if trial.later.slow
        else "standardise every feature where the data are read, (x - mean) / std with the numbers of the training "
        "set, which go with the model; the logarithm first of what spans several decades, and of times and "
        "coordinates the distance from the first",
        reference=_REFERENCE,
        numbers={
            "apart": apart,
            "offset": offset,
            "plain": trial.plain,
            "standardised": trial.cured,
            LEARNT: trial.cured / trial.plain,
        },
    )
