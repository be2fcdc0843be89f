"""Steps of several states, or of complex ones, that numbers alone carry on: what these numbers are.

Such a step has no field, and its skip is no one number: a rotation or an oscillator couples two states entry by entry,
and a complex number turns an entry. A product for each coupled state gives all of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, MOVES, is_affine
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.names.systems import LINEAR_MAP
from stabkit.identification.record import Identification, nothing
from stabkit.identification.steps.linear_recurrence import coupling
from stabkit.identification.steps.step_rules import Made
from stabkit.identification.time.over_time import linear_recurrence
from stabkit.tracing.graph.values import Meta, meta_of, operation, outputs_of

_UNREAD = ("not a step", "unknown", "unnamed", "plain")


@dataclass(frozen=True)
class _Map:
    """A piece as the map of one step."""

    piece: Piece

    @property
    def source_metas(self) -> list[Meta]:
        return [meta_of(value) for value in self.piece.sources]

    @property
    def target_metas(self) -> list[Meta]:
        return [meta_of(value) for value in self.piece.targets]

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        piece = self.piece
        given = dict(zip(piece.targets, cotangents, strict=True))
        arrived = pull(piece.graph, piece.nodes, {n: piece.inputs(n) for n in piece.nodes}, given)
        zeros = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in self.source_metas]
        return [arrived.get(v, zero) for v, zero in zip(piece.sources, zeros, strict=True)]


def with_matrices(record: Identification, around: Surroundings) -> Identification:
    """A record of which nothing but a linear map of its states was read, with the numbers of this map.

    Args:
        record: of consecutive steps.
        around: the flow.
    """
    start, stop = record.steps[0], record.steps[-1] + 1
    found = around.slots(start, stop)
    is_complex = any(meta_of(v).dtype.is_complex for v in found.sources)
    if not (is_complex and record.name.startswith(_UNREAD)) and record.system != LINEAR_MAP:
        return record
    piece = around.whole(start, stop, found)
    if len(piece.sources) != len(piece.targets) or set(piece.sources) & set(piece.targets):
        return record
    active = _on_the_way(piece)
    if not all(is_affine(node, count) for node, count in active.items()):
        return record
    if is_complex and not any(meta_of(v).dtype.is_complex for v in piece.targets):
        why = "of a complex state a real part is read: the space changes, so this is no step of a method"
        return replace(nothing(record.steps, "transition", why, "proven"), over_time=record.over_time)
    coupled = coupling(_Map(piece))
    if coupled is None:
        return record
    told = linear_recurrence(coupled, Made(), "", 1, time=0, fed=False)
    notes = [note.replace("of a time step", "of the step") for note in told.notes]
    notes += [note for note in record.notes if record.system == LINEAR_MAP and "tableau" not in note]
    if any(len(piece.inputs(n)) > count and operation(n) not in MOVES | ADDS for n, count in active.items()):
        notes.append("they depend on the input, and are those at this one")
    return replace(
        record, name=told.name, system=told.system, evidence="measured", residual=told.residual, method=None,
        step_size=None, convention="none: the numbers as they are", skip=None, recorded=(),
        notes=tuple(notes),
    )  # fmt: skip


def _on_the_way(piece: Piece) -> dict[Node, int]:
    """The operations that depend on the states, with how many of their inputs do."""
    reached = set(piece.sources)
    found: dict[Node, int] = {}
    for node in piece.nodes:
        count = sum(v in reached for v in piece.inputs(node))
        if count:
            found[node] = count
            reached.update(outputs_of(node))
    return found
