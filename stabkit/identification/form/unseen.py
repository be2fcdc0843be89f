"""Values that gradients do not see: a state may be scaled by what was detached, or by a mask that was made of it."""

from __future__ import annotations

from collections.abc import Collection

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, PRODUCTS
from stabkit.tracing.graph.values import operation


def unseen(around: Surroundings, start: int, stop: int, paths: Collection[Node]) -> tuple[str, ...]:
    """Operations that cut the gradient inside a method, where something constant meets a state on its way.

    ``x - s * x.detach()`` passes gradients on as x does and is 1 - s times as large; a factor that was made of the
    state by a comparison is one for this input, and another for the next. What is cut off inside a field is the
    field's own.

    Args:
        around: the index of the flow.
        start: where the method begins.
        stop: and ends.
        paths: the operations by which it combines states and fields.
    """
    flow = around.flow
    clock = flow.recorded.graph.clock
    before, after = flow.states[start].position, flow.states[stop].position
    first = clock[before - 1] if before else -1
    last = clock[after] if after < len(clock) else float("inf")
    cut = [s for s in flow.recorded.recording.stopped if first < s.time <= last]
    if not cut:
        return ()
    meets = any(operation(n) in ADDS | PRODUCTS and any(p is None for p, _ in n.next_functions) for n in paths)
    return tuple(dict.fromkeys(s.operation for s in cut)) if meets else ()
