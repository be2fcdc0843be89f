"""What measurements of growth accept: a flow, how many directions, the time that a step takes."""

from __future__ import annotations

import math

from stabkit.errors import TraceError
from stabkit.tracing import FlowLike
from stabkit.tracing.flow_checks import check_flow


def checked_k(flow: FlowLike, k: int | None, default: int) -> int:
    """How many directions to follow: what was asked for, or all up to ``default``.

    Raises:
        ArgumentTypeError: ``flow`` is no flow.
        TraceError: the narrowest state has fewer directions, or the flow has no steps.
    """
    check_flow(flow)
    if not len(flow):
        raise TraceError("the flow has no steps")
    narrowest = min(flow.sizes)
    if k is None:
        return min(narrowest, default)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= narrowest:
        raise TraceError(
            f"k={k!r}; expected a whole number from 1 to {narrowest}, the coordinates of the narrowest state: "
            "a product of Jacobians has no more directions"
        )
    return k


def time_per_step(flow: FlowLike, step_size: float | None) -> float | None:
    """What was given, or what the flow knows; None when a step is a step.

    Raises:
        TraceError: it is no positive number.
    """
    time = flow.step_size if step_size is None else step_size
    if time is not None and not (math.isfinite(time) and time > 0):
        raise TraceError(f"step_size={time!r}; expected a positive number, or None")
    return time
