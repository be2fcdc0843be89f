"""The verdict over time, for a model of which depth says too little: one recurrent module, or a loop over time.

Every step of such a flow changes its space, by the inputs that are still unread, so that growth over depth has no zero;
the gradient that reaches each time step has one, and was measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

from stabkit.diagnosis.over_time.findings import loops_over_time, time_profiles
from stabkit.diagnosis.over_time.scans import WrittenOut
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import Verdict, factor
from stabkit.tracing import Flow


def judged_over_time(flow: Flow, verdict: Verdict, loss: object, thresholds: Thresholds) -> Verdict:
    """The verdict over time in place of one that depth leaves open; that one where nothing runs over time.

    Called where no finding over time is serious: what is beyond the limits then is the memory of gates, which training
    opens.
    """
    if verdict.name != "not judged":
        return verdict
    profiles = time_profiles(flow.forward_pass, loss, loops_over_time(flow))
    profiles += WrittenOut(flow, {profile.path for profile in profiles}).profiles(loss)
    known = [profile for profile in profiles if math.isfinite(profile.growth)]
    if not known:
        return verdict
    worst = max(known, key=lambda profile: abs(profile.growth))
    name = "stable" if abs(worst.growth) <= thresholds.stable else "drift"
    gates = "; gates open while a network trains" if abs(worst.growth) > thresholds.explosion else ""
    summary = (
        f"{name.capitalize()} over time: over {len(worst.log_gradient)} time steps of {worst.path or 'the model'} "
        f"({type(worst.module).__name__}) the gradient changes by a factor of {factor(worst.growth)} on its way from "
        f"the last to the first{gates}; depth alone is too little to judge."
    )
    return replace(verdict, name=name, summary=summary)
