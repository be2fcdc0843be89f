"""What the analyzers of flows take: a flow, and some of them only a traced one."""

from __future__ import annotations

from typing import Any

from stabkit.errors import ArgumentTypeError, TraceError
from stabkit.tracing.flow import Flow
from stabkit.tracing.maps.iteration import Iteration


def check_flow(flow: Any) -> None:
    """Refuse anything but a flow.

    Raises:
        ArgumentTypeError: it is something else.
    """
    if not isinstance(flow, Flow | Iteration):
        raise ArgumentTypeError(
            f"flow is a {type(flow).__name__}; expected what stabkit.trace, stabkit.recurrent_flow or stabkit.iterate "
            "returns, such as stabkit.trace(model, x)"
        )


def traced(flow: Any, purpose: str) -> Flow:
    """The flow, if it is one of a traced forward pass, whose operations can be read.

    Args:
        flow: what the caller was given.
        purpose: the function that needs the operations.

    Raises:
        ArgumentTypeError: it is no flow.
        TraceError: it is an iterated map.
    """
    check_flow(flow)
    if not isinstance(flow, Flow):
        raise TraceError(
            f"{purpose} reads the operations of a traced forward pass, and flow is an iterated map, of which only the "
            "states are known; trace a module that applies the map: stabkit.trace(model, x)"
        )
    return flow
