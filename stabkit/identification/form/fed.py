"""Numbers of a method that an input of the model makes: a mask on the skip, a step size that is passed in.

What is held fixed while depth is counted from one input, and what of it was made off the graph, is a constant for this
pass alone. A method whose numbers are such constants is measured, whatever they are now: a mask of ones is no proof
that the skip is the identity.
"""

from __future__ import annotations

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDENDS, ADDS, JOINS
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, operation


def fed_numbers(around: Surroundings, start: int, stop: int, found: Slots, *, of_stages: bool, skip_alone: bool) -> (
    tuple[str, ...]
):  # fmt: skip
    """Operations of a method that multiply, choose or cut off what it combines by what an input of the model makes.

    Args:
        around: the index of the flow.
        start: where the method begins.
        stop: and ends.
        found: its states.
        of_stages: whether the points at which its fields are evaluated are a part of what is claimed, as those of a
            field that is evaluated several times are. What multiplies the one argument of a field is the field's own.
        skip_alone: whether nothing but how a state is passed on is claimed.
    """
    piece = around.whole(start, stop, found)
    ends = list(piece.targets)
    if of_stages:
        ends += [v for s in around.normal_form(start, stop, found).stages for v in s.entries if v not in piece.ends]
    paths = {node for end in ends for node in piece.expand(end)[1]}
    fed = around.flow.recorded.recording.fed
    known = _depending(around.graph) if fed else frozenset[int]()
    made = [
        node
        for node in piece.nodes
        if node in paths
        and (not skip_alone or any(v in piece.carrying for v in piece.linear[node]))
        and _combines_by_number(piece, node)
        and (not fed.get(node._sequence_nr(), known) <= known or _reads_from_outside(piece, node))
    ]
    return tuple(dict.fromkeys(map(operation, made)))


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


def _reads_from_outside(piece: Piece, node: Node) -> bool:
    """Whether an argument carries gradients of something else than what depth is counted from: of another input."""
    known = set(piece.graph.inputs[node])
    return any(parent is not None and Value(parent, output) not in known for parent, output in node.next_functions)
