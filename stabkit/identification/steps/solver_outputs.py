"""Outputs of solvers: states at several times side by side, of which the last one has passed all steps."""

from __future__ import annotations

from dataclasses import replace

from stabkit.identification.form.operations import JOINS, WRITES
from stabkit.identification.form.slots import Slots
from stabkit.identification.record import Identification
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import moves

_REARRANGE = moves("reshape") | moves("permute")


def last_of_stack(graph: Graph, found: Slots) -> Value | None:
    """The last of several states that were joined, or written into one tensor, as the new state of a step.

    None where a target is anything else: all parts must be of the size of the old state.
    """
    (source,), (target,) = found.sources, found.targets
    target = _as_made(graph, target)
    parts: list[Value] = []
    if operation(target.node) in JOINS:
        parts = list(graph.inputs[target.node])
    while operation(target.node) in WRITES and graph.inputs.get(target.node):
        *before, written = graph.inputs[target.node]
        parts.insert(0, written)
        if len(before) != 1:
            break
        target = before[0]
    size = meta_of(source).numel
    parts = [_as_made(graph, v) for v in parts]
    if len(set(parts)) < 2 or any(meta_of(v).numel != size for v in parts):
        return None
    return max(parts, key=lambda v: graph.rank.get(v.node, -1))


def _as_made(graph: Graph, value: Value) -> Value:
    """A value before it was laid out anew for the join."""
    while operation(value.node) in _REARRANGE and len(graph.inputs.get(value.node, ())) == 1:
        value = graph.inputs[value.node][0]
    return value


def with_others(record: Identification) -> Identification | None:
    """The record of the way to the last state of an output of several; None where it is no method of several steps."""
    if record.method is None or not record.shared_weights or record.name.startswith("unnamed"):
        return None
    why = "states at several times are put side by side as the output: this is the way to the last of them"
    return replace(record, notes=(why, *record.notes))
