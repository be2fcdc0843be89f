"""One stretch of a recorded graph, sorted into what is linear in the states and what is not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.operations import ADDS, JOINS, MOVES, PRODUCTS, SCALES, has_matrix, is_opaque
from stabkit.tracing.graph import Graph
from stabkit.tracing.nodes import apply_node
from stabkit.tracing.values import Value, meta_of, operation


class Piece:
    """The nodes between some source values and some target values.

    Through a *linear* node the states pass by moving, scaling and adding only; a product of two tensors counts as
    linear in the one that carries a state, and the other is its gate. All other nodes are nonlinear, and what they
    give out are *atoms*: beginnings of linear paths, as the sources are.

    Attributes:
        graph: the recorded graph.
        nodes: the nodes, in order.
        sources: the values at the beginning.
        contexts: values that come from before and are held fixed.
        targets: the values at the end.
        ends: sources and contexts.
        linear: for every linear node the inputs that it is linear in.
        carrying: the values that a source reaches along linear nodes.
        merges: the carrying values that are sums of several things.
        base: for every value the last value of which it is a function without weights (norm, activation, statistic).
        gates: atoms that multiply a state.

    Args:
        graph: the recorded graph.
        nodes: those that may lie between the sources and the targets, in order.
        sources: the values at the beginning.
        targets: the values at the end.
        contexts: values that come from before and are held fixed: the input of a recurrent network.
        owned: scalings that belong to a stage, and so count as nonlinear.
    """

    def __init__(
        self,
        graph: Graph,
        nodes: Sequence[Node],
        sources: Sequence[Value],
        targets: Sequence[Value],
        *,
        contexts: Sequence[Value] = (),
        owned: Collection[Node] = (),
    ) -> None:
        self.graph = graph
        self.sources = tuple(sources)
        self.contexts = tuple(contexts)
        self.targets = tuple(targets)
        self.ends = frozenset((*sources, *contexts))
        self.nodes = self._needed(nodes)
        self.inside = set(self.nodes)
        self.linear: dict[Node, list[Value]] = {}
        self.carrying: set[Value] = set(sources)
        self.merges: set[Value] = set()
        self.base: dict[Value, Value] = {value: value for value in self.ends}
        self._gating: dict[Node, Value] = {}
        self._owned = frozenset(owned)
        for node in self.nodes:
            self._sort(node)
        self.gates = self._find_gates()
        self._gate_products()

    def inputs(self, node: Node) -> list[Value]:
        """The inputs of a node that depend on the sources, one entry for every edge."""
        return [v for v in self.graph.inputs[node] if v in self.base]

    def _needed(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """Those nodes that lead to a target without passing a source."""
        known, inside = self.ends, set(nodes)
        wanted: set[Node] = set()
        stack = [value.node for value in self.targets if value not in known]
        while stack:
            node = stack.pop()
            if node in inside and node not in wanted:
                wanted.add(node)
                stack.extend(v.node for v in self.graph.inputs[node] if v not in known)
        return tuple(node for node in nodes if node in wanted)

    def _sort(self, node: Node) -> None:
        edges = self.inputs(node)
        linear = self._linear_inputs(node, edges)
        if linear:
            self.linear[node] = linear
        carried = [v for v in linear if v in self.carrying]
        merged = bool(carried) and operation(node) not in PRODUCTS | JOINS and len(set(linear)) > 1
        bases = {self.base[v] for v in edges}
        weightless = len(bases) == 1 and not has_matrix(node) and not is_opaque(node) and not merged
        for output in range(len(node._input_metadata)):
            value = Value(node, output)
            self.base[value] = next(iter(bases)) if weightless else value
            if carried:
                self.carrying.add(value)
                if merged:
                    self.merges.add(value)

    def _linear_inputs(self, node: Node, edges: list[Value]) -> list[Value]:
        name = operation(node)
        if not edges or is_opaque(node) or node in self._owned:
            return []
        if name in ADDS or name in PRODUCTS or name == "Addcmul":
            statistic = len(edges) == 2 and self._is_statistic_of(edges[0], edges[1])
            if statistic:
                return []  # x - mean(x), x / std(x): part of a norm
        if name in MOVES or name in ADDS or (name in SCALES and len(edges) == 1) or name == "Where":
            return edges
        if name in ("Mean", "Sum") and operation(edges[0].node) == "Stack":
            return edges  # columns joined by their mean
        if name == "Div" and len(edges) == 1:
            return edges if edges[0] == _argument(node, 0) else []
        if name == "Lerp":
            ends = [_argument(node, 0), _argument(node, 1)]
            weight = [v for v in edges if v not in ends]
            if weight:
                self._gating[node] = weight[0]
            return [v for v in edges if v in ends]
        if name == "Addcmul":
            return self._addcmul(node, edges)
        if name in PRODUCTS and len(edges) == 2:
            return self._gated(node, edges)
        return []

    def _is_statistic_of(self, a: Value, b: Value) -> bool:
        """Whether one of two values is a number for many entries of the other, made of it without weights."""
        alike = self.base[a] == self.base[b]
        return alike and a != b and meta_of(a).numel != meta_of(b).numel

    def _gated(self, node: Node, edges: list[Value]) -> list[Value]:
        carried = [v for v in edges if v in self.carrying]
        if len(carried) != 1 or (operation(node) == "Div" and carried[0] != _argument(node, 0)):
            return []
        self._gating[node] = next(v for v in edges if v != carried[0])
        return carried

    def _addcmul(self, node: Node, edges: list[Value]) -> list[Value]:
        added = [v for v in edges if v == _argument(node, 0)]
        factors = [v for v in edges if v not in added]
        if len(factors) == 1:
            return [*added, factors[0]]
        carried = [v for v in factors if v in self.carrying]
        if len(factors) == 2 and len(carried) == 1:
            self._gating[node] = next(v for v in factors if v != carried[0])
            return [*added, carried[0]]
        return []

    def _find_gates(self) -> set[Value]:
        """The atoms of gates that lie on the way of a state to a target."""
        used: set[Node] = set()
        for target in self.targets:
            used |= self.expand(target)[1]
        atoms: set[Value] = set()
        for node, gate in self._gating.items():
            if node in used:
                atoms.update(self.expand(gate)[0])
        return atoms - self.ends

    def _gate_products(self) -> None:
        """A product with a gate that elsewhere multiplies a state is linear in its other factor: T H + (1 - T) x."""
        for node in self.nodes:
            if operation(node) != "Mul" or node in self.linear or len(set(self.inputs(node))) != 2:
                continue
            for gate, other in (self.inputs(node), self.inputs(node)[::-1]):
                atoms = set(self.expand(gate)[0])
                if atoms and atoms <= self.gates and not set(self.expand(other)[0]) <= self.gates:
                    self.linear[node] = [other]
                    self._gating[node] = gate
                    break

    def is_gated(self, path: set[Node]) -> bool:
        """Whether a path passes a product with a tensor that depends on the state."""
        return any(node in self._gating for node in path)

    def expand(self, value: Value) -> tuple[list[Value], set[Node]]:
        """The atoms that a value is a linear combination of, in order, and the linear nodes between."""
        atoms: dict[Value, None] = {}
        path: set[Node] = set()
        stack = [value]
        while stack:
            v = stack.pop()
            if v in self.ends or v.node not in self.linear:
                atoms[v] = None
            elif v.node not in path:
                path.add(v.node)
                stack.extend(self.linear[v.node])
        order = {node: i for i, node in enumerate(self.nodes)}
        return sorted(atoms, key=lambda v: (order.get(v.node, -1), v.output)), path

    def pull(self, path: set[Node], cotangents: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        """Cotangents pulled back along the linear nodes of a path, gates held fixed; what arrives at its atoms."""
        return pull(self.graph, [n for n in self.nodes if n in path], self.linear, cotangents)


def _argument(node: Node, position: int) -> Value | None:
    """The value given for one argument of an operation; None for a constant."""
    parent, output = node.next_functions[position]
    return None if parent is None else Value(parent, output)


def pull(
    graph: Graph, nodes: Sequence[Node], allowed: Mapping[Node, Sequence[Value]], cotangents: Mapping[Value, Tensor]
) -> dict[Value, Tensor]:
    """Cotangents pulled back through some nodes, along the allowed inputs of each only.

    Args:
        graph: the recorded graph.
        nodes: in the order of the forward pass.
        allowed: the inputs of every node that cotangents may go to.
        cotangents: by value.

    Returns:
        The cotangents of all values that none of the nodes made.
    """
    grads = dict(cotangents)
    with torch.no_grad():
        for node in reversed(nodes):
            given = [grads.pop(Value(node, i), None) for i in range(len(node._input_metadata))]
            if all(g is None for g in given):
                continue
            for value, grad in apply_node(node, given, list(allowed[node])):
                grads[value] = grads[value] + grad if value in grads else grad
    return grads
