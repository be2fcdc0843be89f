"""States that a loop writes into a tensor made beforehand, ``xs[i + 1] = x``: it only keeps them for the output.

It is alive from the first step to the last, as a list that is stacked at the end is not, and read at most where a state
that was written is taken from it again, ``x = xs[i]``. What is written is then the new state, what is taken the old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.autograd.graph import Node

from stabkit.identification.form.operations import WRITES
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import moves

_TAKES = moves("select")


@dataclass(frozen=True, eq=False)
class _Store:
    """A tensor that is written to in a step.

    Attributes:
        before: what it was before the step; None at the first, when it holds constants alone.
        written: the values that are put into it.
        taken: what is taken from what it was before.
    """

    before: Value | None
    written: tuple[Value, ...]
    taken: tuple[Value, ...]


def without_stores(graph: Graph, nodes: Sequence[Node], found: Slots) -> Slots | None:
    """The states of a step without the tensors that states are written into; None where there are none, or all is less.

    Args:
        graph: the recorded graph.
        nodes: the operations of the step.
        found: its states, tensors that are written to among them.
    """
    stores = {target: store for target in found.targets if (store := _store(graph, nodes, found, target)) is not None}
    if not stores:
        return None
    kept = {store.before for store in stores.values()}
    sources = [v for v in found.sources if v not in kept]
    targets = [v for v in found.targets if v not in stores]
    taken = [v for store in stores.values() for v in store.taken]
    written = [v for store in stores.values() for v in store.written if v not in (*targets, *sources)]
    for old, new in ((sources, targets), (sources, [*targets, *written]), ([*sources, *taken], [*targets, *written])):
        if (
            len(old) == len(new) > 0
            and set(old) != set(new)
            and sorted(meta_of(v).numel for v in old) == sorted(meta_of(v).numel for v in new)
        ):
            return replace(found, sources=tuple(old), targets=tuple(new), split=False)
    return None


def _store(graph: Graph, nodes: Sequence[Node], found: Slots, target: Value) -> _Store | None:
    """What is written into a new state that is an old one, or constants, but for that."""
    inside, value, written, path = set(nodes), target, list[Value](), set[Node]()
    while value not in found.sources:
        node, shape = value.node, meta_of(value).shape
        if operation(node) not in WRITES or node not in inside:
            return None
        base = [v for v in graph.inputs[node] if meta_of(v).shape == shape]
        written += [v for v in graph.inputs[node] if v not in base]
        path.add(node)
        if len(base) > 1 or not written:
            return None
        if not base:
            return _Store(None, tuple(written), ())
        value = base[0]
    readers = [node for node in nodes if value in graph.inputs[node] and node not in path]
    if any(operation(node) not in _TAKES or len(graph.inputs[node]) > 1 for node in readers) or not written:
        return None
    return _Store(value, tuple(written), tuple(_copied(graph, nodes, Value(node, 0)) for node in readers))


def _copied(graph: Graph, nodes: Sequence[Node], value: Value) -> Value:
    """A value, or a copy of it that alone is read."""
    readers = [node for node in nodes if value in graph.inputs[node]]
    alone = len(readers) == 1 and operation(readers[0]) in ("Clone", "ToCopy")
    return _copied(graph, nodes, Value(readers[0], 0)) if alone else value
