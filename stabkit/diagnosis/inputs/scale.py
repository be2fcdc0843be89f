"""Inputs far from unit scale: what saturates an activation is not the network."""

from __future__ import annotations

import math
from dataclasses import replace

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs.features import Features, changed, features_of
from stabkit.diagnosis.inputs.sizes import INSIDE, Sizes, large_inputs
from stabkit.diagnosis.states.activity import activities
from stabkit.diagnosis.suspects import Diagnosis
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.errors import StabkitError
from stabkit.tracing import Flow, trace
from stabkit.tracing.recording.containers import named_tensors


def with_input_scale(flow: Flow, found: Diagnosis, thresholds: Thresholds) -> tuple[Finding, ...]:
    """The findings, with the input named where standardising it opens the first flat activation again.

    Layers of ReLU in between pass the size on.
    """
    accused = sorted((f for f in found.findings if f.kind == "saturated" and f.steps), key=lambda f: f.steps[0])
    sizes = large_inputs(flow)
    if not accused or sizes is None:
        return found.findings
    size, features = sizes.size, _features(flow)
    before = max((a.saturated for a in found.measurement.steps[accused[0].steps[0]].activities), default=math.nan)
    after = _saturated_at(flow, features, sizes, accused[0].steps[0])
    if after is None or after >= thresholds.saturated:
        return found.findings
    uneven = features is not None and features.uneven
    each = f" (by feature, mean and spread: {features.words})" if features is not None and uneven else ""
    named = replace(
        accused[0],
        evidence=f"the input has the size {size:.3g} and not 1{each}: {before:.0%} of the activation in "
        f"{accused[0].module_path} lies where it is flat, and of the input "
        f"{'with every feature standardised' if uneven else 'divided by its size'} {after:.0%}",
        remedy=_standardise(sizes) if uneven else sizes.remedy,
        reference="LeCun et al., Efficient BackProp, 1998, section 4.3",
        numbers={**accused[0].numbers, "input_size": size, "saturated_after": after},
        actions=tuple(a for a in accused[0].actions if a["action"] == "scale_input" and not uneven),
    )
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
    call = flow.forward_pass
    given = dict([*named_tensors(list(call.inputs)), *named_tensors(call.kwargs)])
    tensor = given.get(flow.source_name)
    return None if tensor is None else features_of(flow, flow.source_name, tensor)


def _saturated_at(flow: Flow, features: Features | None, sizes: Sizes, index: int) -> float | None:
    """Share of saturated outputs of a step when features are standardised, or large inputs divided by their size."""
    call = flow.forward_pass
    other = sizes.divided(call)
    if features is not None and features.uneven:
        source = dict([*named_tensors(list(call.inputs)), *named_tensors(call.kwargs)])[features.name]
        other = changed(call, lambda tensor: features.standardised(tensor) if tensor is source else tensor)
    try:
        scaled = trace(call.model, *other.inputs, kwargs=other.kwargs, seed=call.seed, check=False)
    except StabkitError:
        return None
    if len(scaled.steps) != len(flow.steps):
        return None
    return max((a.saturated for a in activities(scaled, scaled.steps[index])), default=None)
