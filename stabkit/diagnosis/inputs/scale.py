"""Inputs far from unit scale: what saturates an activation is not the network, nor what makes all samples the same."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from stabkit.diagnosis.finding import Finding, as_fact, of_module, serious
from stabkit.diagnosis.inputs.derivatives import differentiates
from stabkit.diagnosis.inputs.features import Features, changed, features_of
from stabkit.diagnosis.inputs.first_matrices import rows_given
from stabkit.diagnosis.inputs.sizes import INSIDE, Sizes, large_inputs
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.learning import beside_a_constant
from stabkit.diagnosis.remedies.slow_starts import SLOWLY, more_steps
from stabkit.diagnosis.remedies.trial import follows, tried
from stabkit.diagnosis.remedies.usual_training import ADAM, left_after, left_only_treated
from stabkit.diagnosis.states.activity import activities
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered
from stabkit.diagnosis.verdict import judged_without
from stabkit.errors import StabkitError
from stabkit.tracing import Flow, trace
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.forward_pass import ForwardPass

_SMALL = 0.1  # root mean square from which on a size is worth a trial, which decides; pixels over 255 twice have .002
_PIXELS = 255.0
_WHOLE = 1e-2  # by how much a pixel may miss a whole number, by rounding in float32
_STEPS = 20  # of a trial: of pixels scaled twice .75 to .97 of the loss stays, .0002 of those brought to size 1
# of what the best constant output leaves of a loss, below which a model has learnt: classifiers that do so on small
# inputs at good accuracy, one with smoothed labels, had .12 and .27 of it, one that their size held back had .40
_LEARNT = 1 / 3
_OF_SIZE = ("rank_collapse", "vanishing", "dead")
_REFERENCE = "LeCun, Bottou, Orr and Müller, Efficient backprop, 1998, section 4.3"


def with_input_scale(flow: Flow, found: Diagnosis, settings: Settings) -> tuple[Finding, ...]:
    """The findings, with the input named where standardising it opens the first flat activation again.

    Layers of ReLU in between pass the size on. Where a loss is known, something comes back to the first layer, and some
    steps learn as it is, it is a fact: the signs of many features tell samples apart as well.
    """
    accused = sorted((f for f in found.findings if f.kind == "saturated" and f.steps), key=lambda f: f.steps[0])
    sizes = large_inputs(flow)
    if not accused or sizes is None:
        return found.findings
    call, features = flow.forward_pass, _features(flow)
    uneven = features is not None and features.uneven
    other = sizes.divided(call)
    if features is not None and uneven:
        source = dict(call.given)[features.name]
        other = changed(call, lambda tensor: features.standardised(tensor) if tensor is source else tensor)
    before = max((a.saturated for a in found.measurement.steps[accused[0].steps[0]].activities), default=math.nan)
    after = _saturated_at(flow, other, accused[0].steps[0])
    if after is None or after >= settings.thresholds.saturated:
        return found.findings
    each = f" (by feature, mean and spread: {features.words})" if features is not None and uneven else ""
    named = replace(
        accused[0],
        evidence=f"the input has the size {sizes.size:.3g} and not 1{each}: {before:.0%} of the activation in "
        f"{accused[0].module_path} lies where it is flat, and of the input "
        f"{'with every feature standardised' if uneven else 'divided by its size'} {after:.0%}",
        remedy=_standardise(sizes) if uneven else sizes.remedy,
        reference="LeCun et al., Efficient BackProp, 1998, section 4.3",
        numbers={**accused[0].numbers, "input_size": sizes.size, "saturated_after": after},
        actions=tuple(a for a in accused[0].actions if a["action"] == "scale_input" and not uneven),
    )
    loss = settings.loss
    if serious(named) and callable(loss) and found.verdict.name != "vanishing":
        later = more_steps(
            call,
            loss,
            lambda by, steps: left_after(other, loss, by, steps=steps),
            settings.optimizer,
            going_on=False,
        )
        named = as_fact(named, f"{later}".removeprefix("; "), SLOWLY) if later.slow else named
    return tuple(named if finding is accused[0] else finding for finding in found.findings)


def _standardise(sizes: Sizes) -> str:
    if sizes.inside:
        return f"subtract the mean of every feature of the input and divide by its standard deviation, {INSIDE}"
    return (
        "standardise the input where the data are read: subtract the mean of every feature and divide by its standard "
        "deviation"
    )


def _features(flow: Flow) -> Features | None:
    """The features of the input that depth is counted from."""
    tensor = dict(flow.forward_pass.given).get(flow.source_name)
    return None if tensor is None else features_of(flow, flow.source_name, tensor)


def _saturated_at(flow: Flow, other: ForwardPass, index: int) -> float | None:
    """Share of saturated outputs of a step in another call."""
    try:
        scaled = trace(other.model, *other.inputs, kwargs=other.kwargs, seed=other.seed, check=False)
    except StabkitError:
        return None
    if len(scaled.steps) != len(flow.steps):
        return None
    return max((a.saturated for a in activities(scaled, scaled.steps[index])), default=None)


def with_small_inputs(flow: Flow, found: Diagnosis, settings: Settings) -> Diagnosis:
    """A diagnosis in which what inputs far smaller than 1 make of the states is told as what follows from them.

    What the first matrices are given counts, whatever the model divided before them. It is brought to size 1 on a copy:
    what the states show, if anything, must go with it, and few steps must learn only so. Where more steps learn as it
    is, it is a slow start and a fact.
    Labels that are smoothed, and noise, have a floor of their own: of a loss far below what the best constant output
    leaves a share of the rest says nothing.
    """
    accused = [f for f in found.findings if serious(f) and f.kind in _OF_SIZE]
    call, loss = flow.forward_pass, settings.loss
    if not callable(loss) or any(serious(f) for f in found.findings if f not in accused):
        return found
    if not accused and any(f.kind == "input_scale" for f in found.findings):
        return found  # features are named already, which is more
    rows = rows_given(call)
    sizes = {path: _rms(given) for path, given in rows.items()}
    if not sizes or not all(0 < size < _SMALL for size in sizes.values()):
        return found
    actions = tuple(remedies.scale_input(path, 1.0 / size) for path, size in sizes.items())
    trial = tried(flow, accused[0], actions, found, settings) if accused else None
    gone = [] if trial is None else trial.gone(accused)
    if trial is not None and (not gone or trial.after is None):
        return found
    now = beside_a_constant(call, loss)
    left = None if now is not None and now < _LEARNT else left_only_treated(call, loss, actions, _STEPS)
    if left is None:
        return found
    plain, treated = left
    later = more_steps(
        call, loss, lambda by, steps: left_after(call, loss, by, actions, steps=steps), settings.optimizer
    )
    size, largest = max(sizes.values()), max(float(given.abs().max()) for given in rows.values())
    twice = 0.5 < largest * _PIXELS <= 1.01
    slow = later.slow and not (twice and all(map(_of_pixels, rows.values())))
    where = "in front of these layers" if differentiates(call, loss) else "where the data are read, or there"
    cause = of_module(
        flow,
        "input_scale",
        "info" if slow else "warning",
        next(iter(sizes)),
        evidence=f"what {listed(tuple(sizes))} is given has the size {size:.2g} and not 1"
        + (f", at most {largest:.3g}, as pixels have that were divided by 255 twice" if twice else "")
        + f": beside the biases it is next to nothing; {_STEPS} steps of {ADAM} leave {plain:.0%} of the loss as it "
        f"is, {treated:.2g} of it with that brought to size 1"
        f"{later}",
        remedy=SLOWLY
        if slow
        else ("divide pixels by 255 once; what is given so far: " if twice else "")
        + f"divide by {size:.2g}, or standardise, {where}",
        reference=_REFERENCE,
        numbers={"input_size": size, "left": plain, "treated": treated},
        actions=actions,
    )
    verdict = found.verdict
    if trial is not None and trial.after is not None and any(f.kind == verdict.name for f in gone):
        verdict = judged_without(verdict, trial.after.verdict, "the size of the input")
    told = [follows(f, cause) if any(f is g for g in gone) else f for f in found.findings]
    return replace(found, verdict=verdict, findings=tuple(ordered([cause, *told])))


def _of_pixels(given: Tensor) -> bool:
    """Whether all numbers are whole ones over 255 squared: a mistake for sure, which the default rate of Adam minds."""
    whole = given.double() * _PIXELS**2
    return bool(((whole - whole.round()).abs() < _WHOLE).all())


def _rms(given: Tensor) -> float:
    return float(given.double().square().mean().sqrt())
