"""Chains that are rounds of a loop over time, each of which changes its space: growth over depth says nothing of them.

A recurrent or spiking network that keeps what it put out has a state that grows with every round. Its rounds are steps
of time, and are judged over time where that was measured, see `stabkit.diagnosis.over_time.verdict`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.verdict import Verdict, not_judged
from stabkit.tracing import Flow, FlowLike

_FEWEST_BLOCKS = 2  # steps that keep their space, from which growth over depth can be judged


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
        f"{rounds} of {len(kinds)} steps are rounds of one loop, and {len(kinds) - blocks} change their space, by what "
        "they put out or have still to read; growth over depth says nothing of a loop over time"
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
