"""The verdict over time, for a model of which depth says too little: one recurrent module, or a loop over time.

Every step of such a flow changes its space, by the inputs that are still unread, so that growth over depth has no zero;
the gradient that reaches each time step has one, and was measured. The rounds of a network that keeps what it put out,
as a recurrent or a spiking one does, change it as well.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from torch import nn

from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.over_time.findings import loops_over_time, time_profiles
from stabkit.diagnosis.over_time.profile import TimeProfile
from stabkit.diagnosis.over_time.scans import WrittenOut
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import Verdict, factor, not_judged
from stabkit.tracing import Flow, FlowLike

_FEWEST_BLOCKS = 2  # steps that keep their space, from which growth over depth can be judged


def judged_over_time(flow: Flow, verdict: Verdict, loss: object, thresholds: Thresholds) -> Verdict:
    """The verdict over time in place of one that depth leaves open; that one where nothing runs over time.

    Called where no finding over time is serious: what is beyond the limits then is the memory of gates, which training
    opens.
    """
    if verdict.name != "not judged":
        return verdict
    profiles = time_profiles(flow.forward_pass, loss, loops_over_time(flow))
    written = WrittenOut(flow, {profile.path for profile in profiles})
    profiles += written.profiles(loss)
    known = [profile for profile in profiles if math.isfinite(profile.growth)]
    if not known:
        return verdict
    worst = max(known, key=lambda profile: abs(profile.growth))
    name = "stable" if abs(worst.growth) <= thresholds.stable else "drift"
    gates = "; gates open while a network trains" if abs(worst.growth) > thresholds.explosion else ""
    count, where = len(worst.log_gradient), f"{worst.path or 'the model'} ({type(worst.module).__name__})"
    of = "input" if isinstance(worst.module, nn.RNNBase) else "state"
    summary = (
        f"{name.capitalize()} over time: over {count} {worst.unit} of {where} the gradient of the loss at the first "
        f"{of} is {factor(worst.growth)} times that at the last, what each gives to the outputs counted{gates}"
        f"{_along(written.with_method(worst) if worst.place >= 0 else worst)}; depth alone is too little to judge."
    )
    return replace(verdict, name=name, summary=summary)


def _along(profile: TimeProfile) -> str:
    """What the states of a recurrence alone do to a gradient, in words; empty where it was not measured."""
    if math.isnan(profile.own):
        return ""
    if profile.own == -math.inf:
        return "; along the states alone, inputs held fixed, nothing comes back from the last to the first"
    rate = profile.own / (len(profile.log_gradient) - 1)
    return f"; along the states alone, inputs held fixed, it changes by {rate:+.3g} nats a {profile.unit[:-1]}"


def of_rounds(flow: FlowLike, verdict: Verdict, measurement: Measurement) -> Verdict:
    """The verdict, or none where fewer than two steps keep their space and most steps are rounds of one loop."""
    kinds = measurement.kinds
    blocks = sum(kind == "step" for kind in kinds)
    if blocks >= _FEWEST_BLOCKS or verdict.name in ("non-finite", "not judged") or not isinstance(flow, Flow):
        return verdict
    rounds = _rounds(flow, measurement)
    if 2 * rounds <= len(kinds):
        return verdict
    why = (
        f"most of the {len(kinds)} steps are rounds of one loop, whose states also hold what was put out and what is "
        "still to be read; growth over depth says nothing of a loop over time"
    )
    return replace(not_judged(verdict, why), stretch=(0, len(kinds) - 1))


def _rounds(flow: Flow, measurement: Measurement) -> int:
    """How many steps run the operations that most of them run, with no parameters of their own."""
    used = Counter(path for step in measurement.steps for path in {weight.path for weight in step.weights})
    shared = [
        flow.steps[step.index].operations
        for step in measurement.steps
        if all(used[weight.path] > 1 for weight in step.weights)
    ]
    ((_, count),) = Counter(shared).most_common(1) or [((), 0)]
    return count
