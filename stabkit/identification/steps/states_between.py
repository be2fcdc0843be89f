"""The states at an end of a step, as a step of the same method has them at its own."""

from __future__ import annotations

from collections.abc import Sequence

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.slots import collectors, joined, parts_of, taken_whole
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, meta_of


def made_by(
    around: Surroundings, record: Identification, states: tuple[Value, ...], beside: Identification
) -> tuple[Value, ...] | None:
    """The old states of a later step as a step makes its new ones: parts that it has just joined, where they are split.

    Args:
        around: the flow.
        record: the step.
        states: the old states of the later one.
        beside: the later one, before which a third one may lie.
    """
    start, stop = record.steps[0], record.steps[-1] + 1
    if beside.steps[0] > stop:
        return _at(around, states, beside.steps[0], stop)
    nodes, before = around.nodes(start, stop), around.flow.states[start].values
    if all(v.node in nodes or v in before for v in states):
        return states
    whole = around.flow.states[beside.steps[0]].values
    parts = joined(around.graph, nodes, whole[0]) if len(whole) == 1 else None
    return parts if parts is not None and len(parts) == len(states) else None


def read_by(
    around: Surroundings, record: Identification, states: tuple[Value, ...], beside: Identification
) -> tuple[Value, ...] | None:
    """The new states of an earlier step as a step reads its old ones: parts that it splits, where they are joined.

    Args:
        around: the flow.
        record: the step.
        states: the new states of the earlier one.
        beside: the earlier one, behind which a third one may lie.
    """
    start, stop = record.steps[0], record.steps[-1] + 1
    if beside.steps[-1] + 1 < start:
        return _at(around, states, beside.steps[-1] + 1, start)
    values, last = around.flow.states[start].values, collectors(around.flow)
    if len(states) == 1:
        nodes = [node for node in around.nodes(start, stop) if node not in last]
        return (taken_whole(around.graph, nodes, states[0]) or states[0],)
    if not states or (len(values) > 1 and not set(states).isdisjoint(values)):
        return states
    # of a trajectory that is kept, the newest
    whole = [v for v in values if len(values) == 1 or set(states) <= set(around.graph.inputs.get(v.node, ()))]
    if len(whole) != 1:
        return states
    nodes = [node for node in around.nodes(start, stop) if node not in last or len(values) == 1]
    parts = parts_of(around.graph, nodes, whole[0])
    return parts if parts is not None and len(parts) == len(states) else None


def _at(around: Surroundings, values: Sequence[Value], there: int, here: int) -> tuple[Value, ...] | None:
    """What stands in one state of the flow where some values do in another of the same shapes; None in others."""
    theirs, ours = (around.flow.states[i].values for i in (there, here))
    if [meta_of(v).shape for v in theirs] != [meta_of(v).shape for v in ours] or not set(values) <= set(theirs):
        return None
    return tuple(ours[theirs.index(v)] for v in values)
