"""Sums beside a state: s' = s + g(x), which nothing reads but more additions, the quadrature of a trajectory.

Where the sum is renewed in a step of its own, s and x look like two states in turn, of which one moves by a field of
the other: half of a reversible step, or of a two-step method. In those the other then moves by a field of the one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch.autograd.graph import Node

from stabkit.tracing import Flow
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, outputs_of


def moves_in_turn(flow: Flow, start: int, stop: int, old: Sequence[Value], new: Sequence[Value]) -> bool:
    """Whether two values of which one stays read each other in turn, as far as the steps around tell; else True.

    Args:
        flow: the recorded steps.
        start: index of the state before.
        stop: index of the state after.
        old: two values before.
        new: two values after, one of them unchanged.
    """
    stays = [v for v in old if v in new]
    if len(old) != 2 or len(new) != 2 or len(stays) != 1:
        return True
    (other,) = stays
    (before,) = (v for v in old if v != other)
    (after,) = (v for v in new if v != other)
    if after not in _made_of(flow, start, stop, other):
        return False
    told = _is_read_later(flow, stop, after, other)
    if told is None:
        told = _was_read_before(flow, start, before, other)
    return told is not False


def is_renewed_beside_sum(flow: Flow, start: int) -> bool:
    """Whether of two steps one renews a state and the other adds to a sum beside it, in either order."""
    if start + 2 >= len(flow.states):
        return False
    states = [flow.states[i].values for i in range(start, start + 3)]
    if any(len(values) != 2 for values in states) or set(states[0]) & set(states[2]):
        return False
    first, second = (set(a) & set(b) for a, b in itertools.pairwise(states))
    if len(first) != 1 or len(second) != 1:
        return False
    if not any(set(flow.states[i + 1].values) & _made_of(flow, i, i + 1, next(iter(stays)))
               for i, stays in zip((start, start + 1), (first, second), strict=True)):  # fmt: skip
        return False  # two branches, of which neither reads the other
    return not all(moves_in_turn(flow, i, i + 1, flow.states[i].values, flow.states[i + 1].values)
                   for i in (start, start + 1))  # fmt: skip


def _is_read_later(flow: Flow, stop: int, value: Value, other: Value) -> bool | None:
    """Whether what replaces the other value is made of this one; None where the other is not replaced beside one."""
    rank = flow.recorded.graph.rank
    for index in range(stop + 1, len(flow.states)):
        values = flow.states[index].values
        if other in values:
            continue
        shape, begin = meta_of(other).shape, flow.states[stop].position
        made = [v for v in values if rank.get(v.node, -1) >= begin and meta_of(v).shape == shape]
        if not made or len(values) < 2:
            return None
        return set(made) <= _made_of(flow, stop, index, value)
    return None


def _was_read_before(flow: Flow, start: int, value: Value, other: Value) -> bool | None:
    """Whether a value was made of what is beside it since before; None where that was made before as well."""
    for index in range(start - 1, -1, -1):
        values = flow.states[index].values
        if other not in values:
            return other in _made_of(flow, index, start, value) if value in values else None
    return None


def _made_of(flow: Flow, start: int, stop: int, value: Value) -> set[Value]:
    """The values between two states that depend on one."""
    graph = flow.recorded.graph
    return _followers(graph, graph.nodes[flow.states[start].position : flow.states[stop].position], value)


def _followers(graph: Graph, nodes: Sequence[Node], value: Value) -> set[Value]:
    found = {value}
    for node in nodes:
        if not found.isdisjoint(graph.inputs[node]):
            found.update(outputs_of(node))
    return found - {value}
