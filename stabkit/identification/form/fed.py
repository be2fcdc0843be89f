"""Numbers of a method that an input of the model makes: a mask on the skip, a step size that is passed in.

What is held fixed while depth is counted from one input, and what of it was made off the graph, is a constant for this
pass alone. A method whose numbers are such constants is measured, whatever they are now: a mask of ones is no proof
that the skip is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDENDS, ADDS, JOINS
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, operation

Way = tuple[Piece, set[Node]]


def ways(around: Surroundings, start: int, stop: int, found: Slots, *, of_stages: bool, skip_alone: bool) -> list[Way]:
    """The operations by which a method combines states and fields, with the stretches that they are sorted in.

    Args:
        around: the index of the flow.
        start: where the method begins.
        stop: and ends.
        found: its states. Of one state every link of the chain counts, also before norms and rectifiers.
        of_stages: whether the points at which its fields are evaluated are a part of what is claimed, as those of a
            field that is evaluated several times are. What multiplies the one argument of a field is the field's own.
        skip_alone: whether nothing but how a state is passed on is claimed: a map may be scaled by anything.
    """
    whole, recording = around.whole(start, stop, found), around.flow.recorded.recording
    if not (recording.fed or recording.stopped or around.reading_outside & whole.inside):
        return []  # nothing but states and parameters is there
    is_chain = len(found.sources) == len(found.targets) == 1
    links = around.chain(start, stop, found) if is_chain else ()
    pieces = [
        *(link.form.piece for link in links if link.kind == "sum" or not skip_alone),
        whole,
    ]
    stages = around.normal_form(start, stop, found).stages if of_stages else ()
    entries = [v for stage in stages for v in stage.entries]
    return [
        (piece, {node for end in (*piece.targets, *entries) if end not in piece.ends for node in piece.expand(end)[1]})
        for piece in pieces
    ]


def fed_numbers(around: Surroundings, found: Sequence[Way], *, skip_alone: bool) -> tuple[str, ...]:
    """Operations of a method that multiply, choose or cut off what it combines by what an input of the model makes.

    Args:
        around: the index of the flow.
        found: see `ways`.
        skip_alone: whether nothing but how a state is passed on is claimed.
    """
    fed = around.flow.recorded.recording.fed
    known = _depending(around.graph) if fed else frozenset[int]()
    made = [
        node
        for piece, path in found
        for node in path
        if (not skip_alone or any(v in piece.carrying for v in piece.linear[node]))
        and _combines_by_number(piece, node)
        and (not fed.get(node._sequence_nr(), known) <= known or node in around.reading_outside)
    ]
    return tuple(sorted(set(map(operation, made))))


def _depending(graph: Graph) -> frozenset[int]:
    """The numbers of the operations that depend on what depth is counted from; what leaves there is the state's own."""
    return frozenset(node._sequence_nr() for node in (*graph.nodes, *(v.node for v in graph.sources)))


def _combines_by_number(piece: Piece, node: Node) -> bool:
    """Whether another argument of an operation says what becomes of the one that it is linear in; a sum adds it."""
    if operation(node) in ADDS | JOINS:
        return False
    if operation(node) not in ADDENDS:
        return True
    factors = [Value(parent, output) for parent, output in node.next_functions[1:] if parent is not None]
    return any(v in factors for v in piece.linear[node])
