"""Layers that read all states before them: a history that grows by one state a layer, mixed by a row of weights.

    u = sum_k w_k y_k,    y_l = u + f(u),

with y_0, ..., y_{l-1} kept as they are (DLCL, Wang et al. 2019; DenseFormer, Pagliardini et al. 2024). As a general
linear method it has one state more after each layer, so no number of one entry describes its skip.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.slots import collectors
from stabkit.identification.record import Identification, nothing
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, outputs_of

_LINEAR = frozenset({"scalar", "diagonal", "gate", "dropout", "samples"})
_SHOWN = 8  # weights in a note


def growing_history(around: Surroundings, start: int, stop: int) -> Identification | None:
    """The record of a step that adds one state to two or more, all of which it keeps and combines linearly.

    The last one of them keeps none: the step before it is of this kind as well.
    """
    before, after = (around.flow.states[i].values for i in (start, stop))
    is_last = len(after) == 1 and len(before) > 2 and growing_history(around, start - 1, start) is not None
    if len(before) < 2 or (len(after) < 2 and not is_last):
        return None
    graph, nodes = around.graph, around.nodes(start, stop)
    used = {v for node in nodes for v in graph.inputs[node]}
    old = [v for v in before if v in used]
    new = [v for v in after if v not in before]
    if len(old) < 2 or len(new) != 1 or not (is_last or all(v in after for v in old)):
        return None
    if is_last:
        new = [_before_the_last_mixture(graph, nodes, old, new[0])]
    if {meta_of(v).shape for v in old} != {meta_of(new[0]).shape}:
        return None
    if not _was_made_alike(around, start, old) or not (is_last or _are_read_again(around, stop, old)):
        return None
    piece = around.piece(nodes, old, new)
    atoms = piece.expand(new[0])[0]
    if any(v not in atoms for v in old):
        return None
    form = around.form_of(piece)
    terms = [form.forms[0].get(v) for v in old]
    known = [c for c in terms if c is not None]
    if len(known) < len(old) or not {c.kind for c in known} <= _LINEAR:
        return None
    told = ", ".join(f"{c.value:.3g}" for c in known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
    of_input = " at this input" if any(c.kind == "gate" for c in known) else ""
    kept = "read for the last time" if is_last else "kept"
    why = f"all {len(old)} states before are {kept}, and mixed with weights {told}{of_input}: no single a describes it"
    name = f"general linear method with a growing history ({len(old)} states)"
    return nothing(
        tuple(range(start, stop)), name, why, "measured", system="x' = f(sum_k w_k x_k), one state more each layer"
    )


def _before_the_last_mixture(graph: Graph, nodes: Sequence[Node], old: Sequence[Value], new: Value) -> Value:
    """What the last layer gives out, where it is mixed with all states before once more; else the new state itself."""
    alive = {new}
    for node in reversed(nodes):
        beside = alive.difference(old)
        if len(alive) > len(old) and len(beside) == 1:
            return beside.pop()
        alive.difference_update(outputs_of(node))
        alive.update(graph.inputs[node])
    return new


def _was_made_alike(around: Surroundings, start: int, old: list[Value]) -> bool:
    """Whether steps before made the states one after the other: each is alive for the first time in another one."""
    first = [next(i for i, state in enumerate(around.flow.states) if v in state.values) for v in old]
    return len(set(first)) == len(old)


def _are_read_again(around: Surroundings, stop: int, old: list[Value]) -> bool:
    """Whether later steps read the states as well, rather than hand them on to be collected for the output."""
    collects = collectors(around.flow)
    later = [node for node in around.graph.nodes[around.flow.states[stop].position :] if node not in collects]
    return set(old) <= {v for node in later for v in around.graph.inputs[node]}
