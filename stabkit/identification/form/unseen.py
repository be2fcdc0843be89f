"""What a tableau does not show: values that gradients do not see, and entries that data choose for this input alone."""

from __future__ import annotations

from collections.abc import Collection

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, PRODUCTS, WRITES
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.values import operation

#: Operations that read, write or add entries by a tensor of indices, or choose them by a mask.
_BY_INDEX = WRITES | {
    "Gather", "Index", "IndexAdd", "IndexFill", "IndexPut", "IndexReduce", "IndexSelect", "MaskedFill", "MaskedSelect",
    "Put", "Scatter", "ScatterAdd", "ScatterReduce", "Take", "Where",
}  # fmt: skip


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


def routed(around: Surroundings, start: int, stop: int, found: Slots) -> tuple[str, ...]:
    """Operations of a method that read or write the entries that data chose, if they show in its tableau.

    What data choose inside the one field of a method is the field's own: x + f(x) is Euler's step whatever f does. It
    shows where it lies on the way of a state, and where it decides how many branches there are.
    """
    times = around.flow.recorded.recording.routed
    if not times:
        return ()
    piece = around.whole(start, stop, found)
    paths = _on_the_way(piece)
    masked = {node for node in paths if operation(node) in PRODUCTS}  # by a mask of zeros and ones
    chosen = [n for n in piece.nodes if (operation(n) in _BY_INDEX or n in masked) and n._sequence_nr() in times]
    branches = around.normal_form(start, stop, found).stages
    shows = len(branches) > 1 or any(node in paths for node in chosen)
    return tuple(dict.fromkeys(map(operation, chosen))) if shows else ()


def _on_the_way(piece: Piece) -> set[Node]:
    """The operations between states that are no field's own."""
    return {node for target in piece.targets for node in piece.expand(target)[1]}
