"""Residual chains inside a branch: x' = x + h R(x), where R is a chain of residual steps itself (RRDB, RCAN, TNT).

The normal form takes all additions apart, those of the branch as well, and finds stages that make no method. What tells
such a branch from the stages of a step is that values lie on it through which everything passes, and that beside it the
state itself is all that is added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from stabkit.identification.form.chain import Link, chain
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, MOVES, SCALES
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.identification.form.tableau import blocks
from stabkit.identification.names.single import name_one_state
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, operation

Reader = Callable[[Surroundings, Slots, Sequence[Link], tuple[int, ...]], Identification]

INSIDE = "a residual lies inside"  # how a note of a step without a skip around it begins that has one in it
_NESTED = " (residual in residual)"
_FEWEST = 2  # additions in a branch: of one, x + g(x + f(x)), the two fields are as likely the stages of a step


def has_residual_inside(record: Identification) -> bool:
    """Whether a step without a skip has a residual step in it, so that it is none of the stages of another."""
    return any(note.startswith(INSIDE) for note in record.notes)


def with_nested_chains(
    around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...], read: Reader
) -> Identification | None:
    """The record of additions with branches that are chains taken as one field each; None where there are none.

    Args:
        around: the flow.
        found: the states.
        links: of the step.
        steps: the steps of the flow.
        read: the reading of the links of a step.
    """
    chains = _nested_chains(around, links)
    if not chains:
        return None
    owned = {node for inner in chains for link in inner for node in link.form.piece.nodes}
    other = around.chain(steps[0], steps[-1] + 1, found, owned)
    if not any(link.kind == "sum" for link in other):
        return None
    record = read(around, found, other, steps)
    if record.name.startswith("unnamed") or record.skip != 1.0:  # x' = x + h R(x)
        return None
    told = "; ".join(dict.fromkeys(in_turn(inner, found.contexts) for inner in chains))
    return replace(record, name=f"{record.name}{_NESTED}", notes=(f"the branch itself is {told}", *record.notes))


def _nested_chains(around: Surroundings, links: Sequence[Link]) -> list[tuple[Link, ...]]:
    """The chains that the branches of some additions are, where these have additions themselves."""
    found = []
    for link in links:
        branch = _branch(around, link.form.piece) if link.kind == "sum" and len(link.form.stages) > 1 else None
        inner = () if branch is None else chain(branch, around.form_of)
        if sum(part.kind == "sum" and bool(part.form.stages) for part in inner) >= _FEWEST:
            found.append(inner)
    return found


MAP, HELD = "a map", "an addition of what is held"


def in_turn(links: Sequence[Link], contexts: Collection[Value]) -> str:
    """What the links of a step do, one after the other."""
    told: list[str] = []
    for link in links:
        table = blocks(link.form, contexts) if link.kind == "sum" else None
        name = None if table is None else name_one_state(table)
        if link.kind != "sum":
            told.append(MAP)
        elif not link.form.stages or (name is not None and name.name.startswith("no branch")):
            told.append(HELD)
        else:
            told.append(name.name if name is not None and name.is_known else "an addition")
    runs = [(text, len(list(run))) for text, run in itertools.groupby(told)]
    return ", then ".join(f"{n} times {text}" if n > 1 and text != MAP else text for text, n in runs)


def _branch(around: Surroundings, piece: Piece) -> Piece | None:
    """What is added to the state, without the numbers that multiply it; None where it is not one value beside it."""
    source, value = piece.sources[0], _unscaled(piece, piece.targets[0])
    inputs = dict.fromkeys(piece.inputs(value.node)) if value not in piece.ends else {}
    if operation(value.node) not in ADDS or len(inputs) != 2:
        return None
    roots = [_unscaled(piece, v) for v in inputs]
    others = [v for v in roots if v != source]
    if len(others) != 1 or others[0] in piece.ends:
        return None
    return around.piece(piece.nodes, piece.sources, others, piece.contexts)


def _unscaled(piece: Piece, value: Value) -> Value:
    while (
        value not in piece.ends and operation(value.node) in SCALES | MOVES and len(set(piece.inputs(value.node))) == 1
    ):
        value = piece.inputs(value.node)[0]
    return value
