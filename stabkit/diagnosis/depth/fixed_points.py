"""Fixed points that are wanted: one step, taken again and again, that settles.

An equilibrium model iterates one field until nothing changes. That the gradient with respect to the start vanishes is
what convergence means, and no fault where nothing that learns lies before the start. What would be one is told
elsewhere: samples that arrive at one and the same point, or units that are dead.
"""

from __future__ import annotations

import itertools

import numpy as np

from stabkit.diagnosis.measurement import Measurement
from stabkit.tracing import Flow, FlowLike, Iteration

_FEWEST = 6  # steps from which one speaks of convergence
_SETTLED = 1e-2  # the last change beside the state, and beside the first change


def settles(flow: FlowLike, measurement: Measurement, stretch: tuple[int, int]) -> str:
    """How the state settles, in words; empty where it does not, or where something that learns lies before."""
    first, last = stretch
    if last - first + 1 < _FEWEST or not _tied(flow, measurement, stretch):
        return ""
    states = list(flow.trajectory()) if isinstance(flow, Iteration) else [s.flatten() for s in flow.states]
    rows = [state.detach().double() for state in states[first : last + 2]]
    if len({row.shape for row in rows}) > 1:
        return ""
    sizes = [float(row.norm()) for row in rows]
    changes = [float((b - a).norm()) for a, b in itertools.pairwise(rows)]
    if min(sizes) == 0.0 or not np.isfinite(sizes).all():
        return ""
    relative = [change / size for change, size in zip(changes, sizes[1:], strict=True)]
    if relative[-1] >= _SETTLED or relative[-1] >= _SETTLED * relative[0]:
        return ""
    return (
        f"the same step is taken {len(changes)} times and settles at a fixed point (a step changes the state by "
        f"{relative[0]:.2g} of its size at first, by {relative[-1]:.2g} at last). That the gradient with respect to "
        "the start shrinks is what convergence means, and nothing that learns lies before the start"
    )


def _tied(flow: FlowLike, measurement: Measurement, stretch: tuple[int, int]) -> bool:
    """Whether all steps of a stretch use the same weights, and no other weight that learns comes before them."""
    if isinstance(flow, Iteration):
        return True
    if not isinstance(flow, Flow):
        return False
    first, last = stretch
    used = {frozenset(w.path for w in step.weights) for step in measurement.steps[first : last + 1]}
    if len(used) != 1 or not next(iter(used)):
        return False
    known = {w.path for step in measurement.steps[first:] for w in step.weights}
    return all(path in known for path, p in flow.model.named_parameters() if p.requires_grad)
