"""What measurements of growth accept: a flow, how many directions, the time that a step takes."""

from __future__ import annotations

import math
from typing import Any

from stabkit.errors import ArgumentTypeError, TraceError
from stabkit.growth.frames import sizes
from stabkit.tracing import Flow, Iteration


def check_flow(flow: Any) -> None:
    """Refuse anything but a flow.

    Raises:
        ArgumentTypeError: it is something else.
    """
    if not isinstance(flow, Flow | Iteration):
        raise ArgumentTypeError(
            f"flow is a {type(flow).__name__}; expected what stabkit.trace, iterate or recurrent_flow returns"
        )


def checked_k(flow: Flow | Iteration, k: int | None, default: int) -> int:
    """How many directions to follow: what was asked for, or all up to ``default``.

    Raises:
        ArgumentTypeError: ``flow`` is no flow.
        TraceError: the narrowest state has fewer directions, or the flow has no steps.
    """
    check_flow(flow)
    if not len(flow):
        raise TraceError("the flow has no steps")
    narrowest = min(sizes(flow))
    if k is None:
        return min(narrowest, default)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= narrowest:
        raise TraceError(
            f"k={k!r}; expected a whole number from 1 to {narrowest}, the coordinates of the narrowest state: "
            "a product of Jacobians has no more directions"
        )
    return k


def time_per_step(flow: Flow | Iteration, step_size: float | None) -> float | None:
    """What was given, or what the flow knows; None when a step is a step.

    Raises:
        TraceError: it is no positive number.
    """
    time = step_size if step_size is not None else flow.step_size if isinstance(flow, Iteration) else None
    if time is not None and not (math.isfinite(time) and time > 0):
        raise TraceError(f"step_size={time!r}; expected a positive number, or None")
    return time
