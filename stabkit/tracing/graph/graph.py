"""The operations between a source and a target, in an order in which they can be cut anywhere.

Activations and norms among them are one operation each, or all operations of one call of a module.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.tracing.graph.entrywise import activations_by_hand
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of
from stabkit.tracing.products.node_derivatives import Cotangents, apply_node, is_python_node, match_layout
from stabkit.vocabulary import ActivationFacts, NormFacts, activation_of, moves, norm_of

if TYPE_CHECKING:
    from stabkit.tracing.recording.recorder import Call

_ACCUMULATE = (1 << 64) - 1  # sequence number of AccumulateGrad nodes

# operations that pass some entries of their input on and drop others
_SELECTING = moves("select", "gather", "write")
# operations that move entries about without mixing them
_MOVING = moves()
_JOINS = moves("join")


@dataclass(frozen=True, eq=False)
class Element:
    """An activation or a norm.

    Attributes:
        facts: what is known of it.
        nodes: its operations, in forward order.
        source: the value that it takes.
        target: the value that it makes.
        module: whose call it is; None for a single operation.
    """

    facts: ActivationFacts | NormFacts
    nodes: tuple[Node, ...]
    source: Value
    target: Value
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        """The class of the module, or the operation."""
        return type(self.module).__name__ if self.module is not None else operation(self.nodes[0])

    def pull(self, graph: Graph, cotangent: Tensor) -> Tensor:
        """A cotangent of the target pulled back to the source."""
        given = {self.target: cotangent}
        with torch.no_grad():
            for node in reversed(self.nodes):
                grads: Cotangents = [given.pop(value, None) for value in outputs_of(node)]
                if all(grad is None for grad in grads):
                    continue
                for value, grad in apply_node(node, grads, graph.inputs[node]):
                    given[value] = given[value] + grad if value in given else grad
        meta = meta_of(self.source)
        found = given.get(self.source)
        return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if found is None else found


class Graph:
    """Autograd nodes on paths from the sources to the targets, in time order.

    Position ``t`` is the moment before ``nodes[t]``; position 0 is the source, ``len(nodes)`` the target.

    Attributes:
        nodes: the nodes, in a topological order that follows the clock as closely as it can.
        inputs: for every node the values it takes that depend on the source.
        reached: whether every target depends on the sources.
        clock: the clock at every position, made monotone.
        calls: the calls of modules around the nodes, where they are known.
        noisy: when, on the clock, values met normal numbers that the pass drew.
        dropped: when they met uniform ones, or masks of them.
        batching: by operations, whether products through many vectors at once agreed with single ones.
        way_back: what nodes run in, some of which may be code of the model.
        passed: nodes that are taken as the identity of the one input that is left to them.
        constants: values that no input of the model made, though they carry gradients: joined to others, and cut off.
    """

    def __init__(self, sources: Sequence[Value], targets: Sequence[Value], *, prune: bool = True) -> None:
        self.sources = tuple(sources)
        self.targets = tuple(targets)
        order = _time_order(self.targets)
        self.nodes, self.inputs, self.reached = _between(order, self.sources, self.targets)
        self.calls: Sequence[Call] = ()
        self.noisy: Collection[int] = ()
        self.dropped: Collection[int] = ()
        self.batching: dict[tuple[object, ...], str] = {}
        self.way_back: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        self.passed: frozenset[Node] = frozenset()
        self.constants: frozenset[Value] = frozenset()
        if prune:
            self._drop_constant()
            self._drop_dead()
        self.rank = {node: position for position, node in enumerate(self.nodes)}
        self.clock = _monotone([node._sequence_nr() for node in self.nodes])

    def along(self, nodes: list[Node], inputs: dict[Node, list[Value]]) -> Graph:
        """Some nodes of this graph, each with the inputs that are followed; all else is shared."""
        other = copy.copy(self)
        other.nodes, other.inputs = nodes, inputs
        other.bends = self.bends  # what reads their results is seen in the whole graph
        return other

    def passing(self, maps: Mapping[Node, Value]) -> Graph:
        """This graph with some maps taken as the identity: by the node that ends one, the value at which it begins."""
        other = self.along(self.nodes, {**self.inputs, **{node: [value] for node, value in maps.items()}})
        other.passed = frozenset(maps)
        return other

    @cached_property
    def composites(self) -> dict[Node, Element]:
        """Activations and norms that are calls of modules with several operations, by each of these."""
        return _composites(self, self.calls)

    @cached_property
    def recurrent(self) -> frozenset[Node]:
        """The operations of recurrent layers: a loop over time, in which no step of depth lies."""
        return frozenset(node for start, stop, _ in self._layers() for node in self.nodes[start:stop])

    def with_open_layers(self, cuts: Sequence[int]) -> Graph:
        """This graph with the operations of recurrent layers that are cut in time like all others.

        Args:
            cuts: positions between which steps are read. A layer with more of them inside than there are rows of cells
                one upon the other is cut in time.
        """
        other = self.along(self.nodes, self.inputs)
        whole = [(a, b) for a, b, rows in self._layers() if sum(a < cut <= b for cut in cuts) <= rows]
        other.recurrent = frozenset(node for start, stop in whole for node in self.nodes[start:stop])
        return other

    def _layers(self) -> Iterator[tuple[int, int, int]]:
        """Where the calls of recurrent layers begin and end, and how many rows of cells they have."""
        for call in self.calls:
            if call.finished and isinstance(call.module, nn.RNNBase):
                rows = call.module.num_layers * (1 + call.module.bidirectional)
                yield self.position(call.start), self.position(call.stop), rows

    @cached_property
    def bends(self) -> frozenset[Node]:
        """The operations of activations that code writes out, see `activations_by_hand`."""
        return activations_by_hand(self.nodes, self.inputs, self.targets)

    @cached_property
    def draws(self) -> bool:
        """Whether a module is in training mode, so that what drops samples at random may do so; True if unknown."""
        return not self.calls or any(call.module.training for call in self.calls)

    def position(self, time: int) -> int:
        """How many nodes had been made when the clock showed ``time``."""
        return bisect.bisect_left(self.clock, time)

    def _drop_constant(self) -> None:
        """Drop what selection takes of a join that is none of what depends on the sources.

        Of ``cat([x, h])``, handed on as one state, ``[..., -1:]`` is the constant h again, and no function of x.
        """
        joined: dict[Value, list[Node]] = {}  # values that hold constants, with the operations since these were joined
        constant: set[Value] = set()  # for what the graph is of; an input that is held fixed may have made it
        for node in self.nodes:
            self.inputs[node] = taken = [value for value in self.inputs[node] if value not in constant]
            name, made = operation(node), outputs_of(node)
            if not taken:
                constant.update(made)
            elif name in _JOINS and len(taken) < len(node.next_functions):
                joined.update({value: [node] for value in made})
            elif taken[0] in joined and len(taken) == 1 and name in _SELECTING | _MOVING and not is_python_node(node):
                chain = [*joined[taken[0]], node]
                joined.update(dict.fromkeys(made, chain))
                constant.update(v for v in made if v not in self.targets and self._holds_constants(v, chain))
        made_of: dict[Value, list[Value]] = {v: [] for v in constant}
        for value in constant:
            first = joined[value][0] if value in joined else value.node
            given = [Value(parent, output) for parent, output in first.next_functions if parent is not None]
            made_of[value] = [v for v in given if v not in self.inputs[first]]
        self.constants = frozenset(v for v in constant if constant.issuperset(made_of[v]))
        if constant:
            self.nodes = [
                node for node in self.nodes if self.inputs[node] and not constant.issuperset(outputs_of(node))
            ]

    def _holds_constants(self, value: Value, chain: Sequence[Node]) -> bool:
        """Whether nothing of a value, the last of some moves, arrives at what the first of them, a join, was given."""
        used: dict[Value, Tensor | None] = {value: None}
        for node in reversed(chain):
            used = dict(self._pull_mask(node, used))
        return not used

    def _drop_dead(self) -> None:
        """Drop edges along which selection lets nothing through.

        ``stack(hidden_states)[-1]`` or a preallocated buffer would otherwise keep every state alive to the end. A
        mask of what is used is pushed back: exactly through nodes that only move entries, as "everything" elsewhere.
        """
        used: dict[Value, Tensor | None] = dict.fromkeys(self.targets)  # None: every entry is used
        kept, inputs = [], {}
        for node in reversed(self.nodes):
            outputs = [value for value in outputs_of(node) if value in used]
            if not outputs:
                continue
            kept.append(node)
            name = operation(node)
            partial = name in _SELECTING or (name in _MOVING and any(used[value] is not None for value in outputs))
            if partial and not is_python_node(node):
                masks = self._pull_mask(node, used)
                inputs[node] = [value for value in self.inputs[node] if value in masks]
                for value, mask in masks.items():
                    _join(used, value, mask)
            else:
                inputs[node] = self.inputs[node]
                used.update(dict.fromkeys(inputs[node]))
        self.nodes, self.inputs = kept[::-1], inputs

    def _pull_mask(self, node: Node, used: dict[Value, Tensor | None]) -> dict[Value, Tensor]:
        cotangents: Cotangents = []
        for value in outputs_of(node):
            if value not in used:
                cotangents.append(None)
                continue
            meta, mask = meta_of(value), used[value]
            everything = torch.ones((), dtype=torch.float32, device=meta.device).to(meta.dtype).expand(meta.shape)
            cotangents.append(everything if mask is None else mask.to(meta.dtype))
        with torch.no_grad():
            pulled = apply_node(node, cotangents, self.inputs[node])
        masks: dict[Value, Tensor] = {}
        for value, cotangent in pulled:
            mask = cotangent != 0
            if bool(mask.any()):
                masks[value] = masks[value] | mask if value in masks else mask
        return masks


def _join(used: dict[Value, Tensor | None], value: Value, mask: Tensor) -> None:
    before = used.get(value, mask)
    joined = None if before is None else mask if before is mask else before | mask
    used[value] = None if joined is None or bool(joined.all()) else joined


def _time_order(targets: Sequence[Value]) -> list[Node]:
    """Every node above the targets, inputs first.

    Sequence numbers alone are not a topological order: a view that is regenerated after an in-place write gets its
    number after the node that consumes it. Kahn's algorithm from the targets, latest number first, is one.
    """
    parents: dict[Node, list[Node]] = {}
    stack = [value.node for value in targets]
    while stack:
        node = stack.pop()
        if node in parents:
            continue
        parents[node] = [parent for parent, _ in node.next_functions if parent is not None]
        stack.extend(parents[node])
    consumers: defaultdict[Node, int] = defaultdict(int)
    for above in parents.values():
        for parent in above:
            consumers[parent] += 1
    heap = [(-node._sequence_nr(), id(node), node) for node in parents if consumers[node] == 0]
    heapq.heapify(heap)
    latest_first = []
    while heap:
        number, _, node = heapq.heappop(heap)
        if -number != _ACCUMULATE:
            latest_first.append(node)
        for parent in parents[node]:
            consumers[parent] -= 1
            if consumers[parent] == 0:
                heapq.heappush(heap, (-parent._sequence_nr(), id(parent), parent))
    return latest_first[::-1]


def _between(
    order: list[Node], sources: tuple[Value, ...], targets: tuple[Value, ...]
) -> tuple[list[Node], dict[Node, list[Value]], bool]:
    """The nodes on source -> target paths, with their inputs on such paths."""
    source_nodes = {value.node for value in sources}
    live_values = set(sources)
    live_nodes: set[Node] = set()
    inputs: dict[Node, list[Value]] = {}
    for node in order:
        if node in source_nodes:
            continue
        taken = [Value(parent, output) for parent, output in node.next_functions if parent is not None]
        taken = [value for value in taken if value in live_values or value.node in live_nodes]
        if taken:
            live_nodes.add(node)
            inputs[node] = taken
    reached = all(target in live_values or target.node in live_nodes for target in targets)
    needed = {target.node for target in targets}
    kept = []
    for node in reversed(order):
        if node in needed and node in inputs:
            kept.append(node)
            needed.update(value.node for value in inputs[node])
    nodes = kept[::-1]
    return nodes, {node: inputs[node] for node in nodes}, reached


def _monotone(numbers: list[int]) -> list[int]:
    for i in range(len(numbers) - 2, -1, -1):
        numbers[i] = min(numbers[i], numbers[i + 1])
    return numbers


def mend_batch_norm(graph: Graph) -> None:
    """Let the engine, too, pass batch-norm cotangents in the layout of the saved input (see `match_layout`)."""
    for node in graph.nodes:
        if "BatchNorm" in type(node).__name__:
            node.register_prehook(lambda grads, node=node: tuple(match_layout(node, grads)))


def element_of(graph: Graph, node: Node) -> Element | None:
    """The activation or norm that an operation is, or is a part of; None where it is none."""
    whole = graph.composites.get(node)
    if whole is not None:
        return whole
    inputs = set(graph.inputs[node])
    facts = (activation_of(node) or norm_of(node)) if len(inputs) == 1 else None
    return None if facts is None else Element(facts, (node,), next(iter(inputs)), Value(node, 0))


def _composites(graph: Graph, calls: Sequence[Call]) -> dict[Node, Element]:
    """Calls of modules that the vocabulary knows as one and that made several operations, by each of these."""
    last_read = {value: len(graph.nodes) for value in graph.targets}
    for position, node in enumerate(graph.nodes):
        for value in graph.inputs[node]:
            last_read[value] = max(position, last_read.get(value, 0))
    found: dict[Node, Element] = {}
    for call in calls:
        if next(call.module.children(), None) is not None:
            continue
        start, stop = graph.position(call.start), graph.position(call.stop)
        nodes = tuple(graph.nodes[start:stop])
        whole = len(nodes) > 1 or (len(nodes) == 1 and is_python_node(nodes[0]))
        if not whole or nodes[0] in found:
            continue
        inside = frozenset(nodes)  # a recurrent layer has thousands
        sources = {value for node in nodes for value in graph.inputs[node] if value.node not in inside}
        made = {value for node in nodes for value in outputs_of(node) if last_read.get(value, 0) >= stop}
        if len(sources) != 1 or len(made) != 1:
            continue
        source, target = sources.pop(), made.pop()
        facts = activation_of(call.module) or norm_of(call.module)
        if facts is not None and meta_of(source).shape == meta_of(target).shape:
            found.update(dict.fromkeys(nodes, Element(facts, nodes, source, target, call.module)))
    return found
