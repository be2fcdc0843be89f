"""Entries that data choose: experts, tokens. Which ones holds for this input, and so does a tableau that shows them."""

from __future__ import annotations

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import PRODUCTS, WRITES
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.values import operation

#: Operations that read, write or add entries by a tensor of indices, or choose them by a mask.
_BY_INDEX = WRITES | {
    "Gather", "Index", "IndexAdd", "IndexFill", "IndexPut", "IndexReduce", "IndexSelect", "MaskedFill", "MaskedSelect",
    "Put", "Scatter", "ScatterAdd", "ScatterReduce", "Take", "Where",
}  # fmt: skip


def routed(around: Surroundings, start: int, stop: int, found: Slots) -> tuple[str, ...]:
    """Operations of a method that read or write the entries that data chose, if they show in its tableau.

    What data choose inside the one field of a method is the field's own: x + f(x) is Euler's step whatever f does. It
    shows where it lies on the way of a state, and where it decides how many branches there are.
    """
    times = around.flow.recorded.recording.routed
    if not times:
        return ()
    piece = around.whole(start, stop, found)
    paths: set[Node] = set()
    for target in piece.targets:
        paths |= piece.expand(target)[1]
    masked = {node for node in paths if operation(node) in PRODUCTS}  # by a mask of zeros and ones
    chosen = [n for n in piece.nodes if (operation(n) in _BY_INDEX or n in masked) and n._sequence_nr() in times]
    branches = around.normal_form(start, stop, found).stages
    shows = len(branches) > 1 or any(node in paths for node in chosen)
    return tuple(dict.fromkeys(map(operation, chosen))) if shows else ()
