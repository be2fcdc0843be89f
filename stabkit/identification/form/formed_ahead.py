"""States that were prepared for the next step before the cut: a x_(n-1) + b x_n, or a v, with the next numbers.

Code that writes x_next = a * x_prev + b * x + c * f(x) forms the first two terms before it calls f. What is alive there
is another basis of the same two states, and a basis that changes from step to step: the trace and the determinant of
such a step mix the numbers of two of them. So the states are followed back to what they were made of, at both ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch.autograd.graph import Node

from stabkit.identification.form.coefficients import LinearCombination
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import MOVES, SCALES
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.values import Value, operation


def as_made(around: Surroundings, found: Slots, start: int, stop: int) -> Slots:
    """States as they were before they were prepared for the next step; unchanged where that is not so at both ends.

    Args:
        around: the index of the flow.
        found: as many new states as old ones, each at the place of the one that it follows.
        start: the state of the flow at which the step begins.
        stop: and at which it ends.
    """
    if start == 0 or found.split or len(found.sources) != len(found.targets):
        return found
    states = around.flow.states
    new = _as_made(around, start, stop, dict(enumerate(found.targets)), states[start].values)
    # x + h v' is a state that moves, and none that was prepared
    new = {i: made for i, made in new.items() if made != found.sources[i]}
    old = _as_made(around, start - 1, start, {i: found.sources[i] for i in new}, states[start - 1].values)
    if not new or old.keys() != new.keys():
        return found
    sources = tuple(old.get(i, v) for i, v in enumerate(found.sources))
    targets = tuple(new.get(i, v) for i, v in enumerate(found.targets))
    if len(set(sources)) < len(sources) or len(set(targets)) < len(targets):
        return found
    return replace(found, sources=sources, targets=targets, earlier=1)


def _as_made(
    around: Surroundings, start: int, stop: int, values: Mapping[int, Value], olds: Sequence[Value]
) -> dict[int, Value]:
    """What some states at the end of a step were prepared from, by their places."""
    nodes = around.nodes(start, stop)
    inside = set(nodes)
    ends = around.flow.states[stop].values
    found: dict[int, Value] = {}
    for place, value in values.items():
        if value.node not in inside:
            continue
        others = [v for v in ends if v != value and v not in olds]
        made = _made_of(around.piece(nodes, olds, [value], others), value, olds)
        made = made or _scaled(around, nodes, value)
        if made is not None:
            found[place] = made
    return found


def _made_of(piece: Piece, value: Value, olds: Collection[Value]) -> Value | None:
    """The one old state in a combination, by numbers, of states alone."""
    atoms, _ = piece.expand(value)
    if not all(a in piece.ends for a in atoms):
        return None
    terms = LinearCombination(piece, value).coefficients()
    before = [a for a in atoms if a in olds]  # also where its number is zero at first (FISTA)
    if len(before) != 1 or any(c.kind != "scalar" for c in terms.values()):
        return None
    return before[0]


def _scaled(around: Surroundings, nodes: Sequence[Node], value: Value) -> Value | None:
    """What was multiplied by a number at last, where something else reads it as it was."""
    graph, inside = around.graph, set(nodes)
    made, before, multiplied = value, value.node, False
    while operation(made.node) in SCALES | MOVES and len(graph.inputs[made.node]) == 1:
        before, multiplied = made.node, multiplied or operation(made.node) in SCALES
        made = graph.inputs[made.node][0]
        if made.node not in inside:
            return None
        if multiplied and any(made in graph.inputs[node] for node in nodes if node is not before):
            return made
    return None
