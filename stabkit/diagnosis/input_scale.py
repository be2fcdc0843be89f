"""Inputs far from unit scale: what saturates an activation is not the network."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from stabkit.diagnosis.activity import activities
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.suspects import Diagnosis
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.errors import StabkitError
from stabkit.tracing import Flow, trace
from stabkit.tracing.containers import map_tensors, named_tensors

FAR = 10.0  # root mean square of an input from which its size is a cause


def with_input_scale(flow: Flow, found: Diagnosis, thresholds: Thresholds) -> tuple[Finding, ...]:
    """The findings, with the input named where dividing it by its size opens the first flat activation again.

    Layers of ReLU in between pass the size on.
    """
    accused = sorted((f for f in found.findings if f.kind == "saturated" and f.steps), key=lambda f: f.steps[0])
    size = input_size(flow)
    if not accused or size is None or size < FAR:
        return found.findings
    before = max((a.saturated for a in found.measurement.steps[accused[0].steps[0]].activities), default=math.nan)
    after = _saturated_at(flow, size, accused[0].steps[0])
    if after is None or after >= thresholds.saturated:
        return found.findings
    named = replace(
        accused[0],
        evidence=f"the input has the size {size:.3g} and not 1: {before:.0%} of the activation in "
        f"{accused[0].module_path} lies where it is flat, and of the input divided by its size {after:.0%}",
        remedy="standardise the input where the data are read: subtract its mean and divide it by its standard "
        f"deviation (about {size:.3g})",
        reference="LeCun et al., Efficient BackProp, 1998, section 4.3",
        numbers={**accused[0].numbers, "input_size": size, "saturated_after": after},
        actions=tuple(action for action in accused[0].actions if action["action"] == "scale_input"),
    )
    return tuple(named if finding is accused[0] else finding for finding in found.findings)


def input_size(flow: Flow) -> float | None:
    """Root mean square of the input that depth is counted from; None for what was looked up."""
    call = flow.forward_pass
    given = dict([*named_tensors(list(call.inputs)), *named_tensors(call.kwargs)])
    tensor = given.get(flow.source_name)
    if tensor is None or not tensor.is_floating_point() or not tensor.numel():
        return None
    return float(tensor.detach().double().square().mean().sqrt())


def _saturated_at(flow: Flow, size: float, index: int) -> float | None:
    """Share of saturated outputs of a step when float inputs are divided by their size."""
    call = flow.forward_pass

    def smaller(tensor: Tensor) -> Tensor:
        return tensor / size if tensor.is_floating_point() else tensor

    inputs, kwargs = map_tensors([call.inputs, call.kwargs], smaller)
    try:
        scaled = trace(call.model, *inputs, kwargs=kwargs, seed=call.seed, check=False)
    except StabkitError:
        return None
    if len(scaled.steps) != len(flow.steps):
        return None
    return max((a.saturated for a in activities(scaled, scaled.steps[index])), default=None)
