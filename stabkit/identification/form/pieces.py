"""One stretch of a recorded graph, sorted into what is linear in the states and what is not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.gates import adds_constant, is_gate, weights_of_stages
from stabkit.identification.form.operations import (
    ADDENDS,
    ADDS,
    CONTRACTIONS,
    JOINS,
    MOVES,
    PRODUCTS,
    SCALES,
    WRITES,
    has_matrix,
    is_opaque,
)
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, random_tensors
from stabkit.tracing.products.node_derivatives import apply_node
from stabkit.vocabulary import norm_of

#: Output number of what an operation adds to its first input, as if it were a value of its own.
ADDED = -1
_MULTIPLIES = MOVES | SCALES
_SUMS_AND_PRODUCTS = ADDS | PRODUCTS
_ROUNDINGS = 64.0
_DEVIATIONS = 4.0  # of a mean from 0: one draw in 16,000 is missed; a dropout of std .5 is taken for noise below n = 4


class Piece:
    """The nodes between some source values and some target values.

    Through a *linear* node the states pass by moving, scaling and adding only; a product of two tensors counts as
    linear in the one that carries a state, and the other is its gate. All other nodes are nonlinear, and what they
    give out are *atoms*: beginnings of linear paths, as the sources are. An operation that adds a product to its first
    input, such as ``addmm``, is linear in that, and the product is an atom, ``Value(node, ADDED)``.

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
        stacked: values that hold several tensors side by side, which a contraction then adds.
        owned: operations that belong to a stage whatever they do; those of recurrent layers and of written-out
            activations always.
        doubtful: products of a state and what is no gate but has a constant in it, with the state: x (1 + a(x)).
        added: for operations that add something nonlinear to their first input, what that is made of.

    Args:
        graph: the recorded graph.
        nodes: those that may lie between the sources and the targets, in order.
        sources: the values at the beginning.
        targets: the values at the end.
        contexts: values that come from before and are held fixed: the input of a recurrent network.
        owned: operations that belong to a stage, and so count as nonlinear.
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
        self._order = {node: position for position, node in enumerate(self.nodes)}
        self.linear: dict[Node, list[Value]] = {}
        self.carrying: set[Value] = set(sources)
        self.merges: set[Value] = set()
        self.base: dict[Value, Value] = {value: value for value in self.ends}
        self.added: dict[Node, list[Value]] = {}
        self.stacked: set[Value] = set()
        self._statistics: set[Value] = set()  # one number for many entries, also where it is expanded again
        self._gating: dict[Node, Value] = {}
        self._of_state: set[Value] = set(sources)
        self.doubtful: dict[Node, list[Value]] = {}
        self.owned = frozenset(owned) | ((graph.recurrent | graph.bends) & self.inside)
        for node in self.nodes:
            self._sort(node)
        self.gates = self._find_gates()
        self._gate_products()
        self._weigh_stages()

    def owning(self, more: Collection[Node]) -> Piece:
        """The same stretch, with more operations that belong to stages."""
        owned = self.owned.union(more)
        if owned == self.owned:
            return self
        return Piece(self.graph, self.nodes, self.sources, self.targets, contexts=self.contexts, owned=owned)

    def inputs(self, node: Node) -> list[Value]:
        """The inputs of a node that depend on the sources, one entry for every edge."""
        return [v for v in self.graph.inputs[node] if v in self.base]

    def inputs_of(self, atom: Value) -> list[Value]:
        """What an atom is made of: the inputs of its node, without a first one that something is added to."""
        return self.added[atom.node] if atom.output == ADDED else self.inputs(atom.node)

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
        merged, carried = False, False
        if linear:
            self.linear[node] = linear
            carried = any(v in self.carrying for v in linear)
        if carried:
            name = operation(node)
            contracted = name in CONTRACTIONS
            terms = len(self._joined(node) or ()) if contracted else len(set(linear)) + (node in self.added)
            merged = terms > 1 and name not in PRODUCTS and name not in JOINS
        bases = {self.base[v] for v in edges}
        weightless = len(bases) == 1 and not merged and not has_matrix(node) and not self.hides(node)
        weightless = weightless and not self._projects(node)
        of_state = any(v in self._of_state for v in edges)
        for value in outputs_of(node):
            if of_state:
                self._of_state.add(value)
            self.base[value] = next(iter(bases)) if weightless else value
            narrow = weightless and meta_of(value).numel < meta_of(self.base[value]).numel
            if narrow or (weightless and all(v in self._statistics for v in edges)):
                self._statistics.add(value)
            if carried:
                self.carrying.add(value)
                if merged:
                    self.merges.add(value)

    def _linear_inputs(self, node: Node, edges: list[Value]) -> list[Value]:
        name = operation(node)
        if node in self.graph.passed:
            return edges
        if not edges or is_opaque(node) or node in self.owned or node in self.graph.composites:
            return []
        if name in ADDS or name in PRODUCTS or name == "Addcmul":
            statistic = len(edges) == 2 and self._is_statistic_of(edges[0], edges[1])
            if statistic:
                return []  # x - mean(x), x / std(x): part of a norm
        if name in MOVES or name in ADDS or (name in SCALES and len(edges) == 1) or name == "Where":
            return edges
        if name in CONTRACTIONS:
            return edges if self._combines(node, edges) else []
        if name == "Div" and len(edges) == 1:
            return edges if edges[0] == _argument(node, 0) else []
        if name == "Lerp":
            ends = [_argument(node, 0), _argument(node, 1)]
            weight = [v for v in edges if v not in ends]
            if weight and not self._may_gate(weight[0]):
                return []
            if weight:
                self._gating[node] = weight[0]
            return [v for v in edges if v in ends]
        if name in ADDENDS:
            return self._product(node, edges) or self._addend(node, edges)
        if name in PRODUCTS and len(edges) == 2:
            return self._gated(node, edges)
        return []

    def hides(self, node: Node) -> bool:
        """Whether an operation may hide anything: one that is opaque, and no part of what is known as one."""
        return is_opaque(node) and node not in self.graph.composites

    def _is_statistic_of(self, a: Value, b: Value) -> bool:
        """Whether one of two values is a number for many entries of the other, made of it without weights."""
        alike = self.base[a] == self.base[b]
        narrow = meta_of(a).numel != meta_of(b).numel or (a in self._statistics) != (b in self._statistics)
        return alike and a != b and narrow

    def is_norm(self, value: Value) -> bool:
        """Whether a value was divided by a statistic of itself, or has its mean taken away."""
        edges = self.inputs(value.node)
        by_hand = operation(value.node) in _SUMS_AND_PRODUCTS and len(edges) == 2 and self._is_statistic_of(*edges)
        return norm_of(value.node) is not None or by_hand

    def has_factors(self, node: Node) -> bool:
        """Whether an operation multiplies every entry by a constant of its own."""
        saved = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
        constant = [t for t in saved if isinstance(t, Tensor) and t.grad_fn is None]
        return operation(node) == "Mul" and any(t.numel() > 1 for t in constant)

    def _projects(self, node: Node) -> bool:
        """Whether an operation multiplies entries by constants of both signs, which are no weights of a mean."""
        saved = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")] * self.has_factors(node)
        constant = [t for t in saved if isinstance(t, Tensor) and t.grad_fn is None and not t.is_complex()]
        return any(bool((t > 0).any()) and bool((t < 0).any()) for t in constant if t.numel() > 1)

    def _gated(self, node: Node, edges: list[Value]) -> list[Value]:
        carried = [v for v in edges if v in self.carrying]
        if len(carried) != 1 or (operation(node) == "Div" and carried[0] != _argument(node, 0)):
            return []
        gate = next(v for v in edges if v != carried[0])
        if operation(node) == "Mul" and not self._may_gate(gate):  # what divides may grow: x / (1 + h w)
            if adds_constant(gate, self.inputs, self.ends):
                self.doubtful[node] = carried
            return []
        self._gating[node] = gate
        return carried

    def _may_gate(self, value: Value) -> bool:
        return is_gate(value, self.inputs, self._of_state, self.ends)

    def _product(self, node: Node, edges: list[Value]) -> list[Value]:
        """Inputs in which x + v a b or x + v a / b is linear: x, and a factor when the other is constant or a gate."""
        if operation(node) not in ("Addcmul", "Addcdiv"):
            return []
        arguments = [_argument(node, i) for i in range(3)]  # by place: x + v x b takes x as both
        added, factors = ([v for v in given if v in edges] for given in (arguments[:1], arguments[1:]))
        divided = operation(node) == "Addcdiv" and _argument(node, 2) in factors
        if len(factors) == 1 and not divided:
            return [*added, factors[0]]
        carried = [v for v in factors if v in self.carrying]
        if len(factors) == 2 and len(carried) == 1 and not divided:
            gate = next(v for v in factors if v != carried[0])
            if self._may_gate(gate):
                self._gating[node] = gate
                return [*added, carried[0]]
        return []

    def _addend(self, node: Node, edges: list[Value]) -> list[Value]:
        """The first input, when something else is added to it."""
        first = _argument(node, 0)
        if first not in edges or len(edges) == 1:
            return []
        self.added[node] = edges[edges.index(first) + 1 :]
        return [first]

    def _joined(self, node: Node) -> list[Value] | None:
        """The tensors that stand side by side in the input of a contraction; None when it is not made of such."""
        parts: list[Value] = []
        for value in self._stacked(node):
            if value in self.ends or operation(value.node) not in _MULTIPLIES:
                return None
            inner = self.inputs(value.node)
            if operation(value.node) in JOINS | WRITES:
                parts += [v for v in inner if v in self.ends or operation(v.node) not in WRITES]
            elif len(self.linear.get(value.node, ())) != 1:
                return None
        return parts

    def _stacked(self, node: Node) -> set[Value]:
        """The values between a contraction and the tensors that were put side by side."""
        stack, found = list(self.inputs(node)), set[Value]()
        while stack:
            value = stack.pop()
            if value in found:
                continue
            found.add(value)
            name = operation(value.node)
            if value in self.ends or name in JOINS or name not in _MULTIPLIES:
                continue
            inner = self.inputs(value.node)
            stack += [v for v in inner if name not in WRITES or (v not in self.ends and operation(v.node) in WRITES)]
        return found

    def _combines(self, node: Node, edges: list[Value]) -> bool:
        """Whether a contraction multiplies tensors that stand side by side by a number each, and adds them."""
        parts = self._joined(node) if len(edges) == 1 else None
        output = Value(node, 0)
        if not parts or any(meta_of(part).numel != meta_of(output).numel for part in parts):
            return False
        w = random_tensors([output], seed=0)[0]
        between = [n for n in self.nodes[: self.nodes.index(node)] if n in self.linear and n not in _nodes_of(parts)]
        arrived = pull(self.graph, [*between, node], {**self.linear, node: edges}, {output: w})
        if not all(_is_multiple(arrived[part], w) for part in parts if part in arrived):
            return False
        self.stacked.update(self._stacked(node))
        return True

    def _find_gates(self) -> set[Value]:
        """The atoms of gates that lie on the way of a state to a target."""
        if not self._gating:
            return set()
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
        for node in self.nodes if self.gates else ():
            if operation(node) != "Mul" or node in self.linear or len(set(self.inputs(node))) != 2:
                continue
            for gate, other in (self.inputs(node), self.inputs(node)[::-1]):
                atoms = set(self.expand(gate)[0])
                if atoms and atoms <= self.gates and not set(self.expand(other)[0]) <= self.gates:
                    self.linear[node] = [other]
                    self._gating[node] = gate
                    break

    def _weigh_stages(self) -> None:
        """A product with a gate that weighs a stage against another one is linear in it: g k_1 + (1 - g) k_2."""
        made = [v for target in self.targets if target in self.carrying for v in self.expand(target)[0]]
        products = [v for v in made if v not in self.ends and operation(v.node) == "Mul" and v.node not in self.owned]
        if len(products) > 1:
            for node, (gate, weighed) in weights_of_stages(products, self.inputs, self.ends).items():
                self.linear[node] = [weighed]
                self._gating[node] = gate

    def is_gated(self, path: set[Node]) -> bool:
        """Whether a path passes a product with a tensor that depends on the state."""
        return any(node in self._gating for node in path)

    def is_noisy(self, node: Node) -> bool:
        """Whether normal numbers around 0 that the pass drew are added to what depends on the state, or multiply it."""
        return node._sequence_nr() in self.graph.noisy and _is_centred(node)

    def expand(self, value: Value) -> tuple[list[Value], set[Node]]:
        """The atoms that a value is a linear combination of, in order, and the linear nodes between."""
        atoms: dict[Value, None] = {}
        path: set[Node] = set()
        stack = [value]
        while stack:
            v = stack.pop()
            if v in self.ends or v.node not in self.linear or v.output == ADDED:
                atoms[v] = None
            elif v.node not in path:
                path.add(v.node)
                stack.extend(self.linear[v.node])
                if v.node in self.added:
                    atoms[Value(v.node, ADDED)] = None
        return sorted(atoms, key=lambda v: (self._order.get(v.node, -1), v.output)), path

    def may_hide_skip(self) -> bool:
        """Whether the old state reaches the new one by way of a product with a factor that has a constant in it."""
        stack, seen = list(self.targets), set[Value]()
        while stack and self.doubtful:
            v = stack.pop()
            if v in self.sources:
                return True
            if v not in seen and v not in self.ends:
                seen.add(v)
                stack.extend([*self.linear.get(v.node, ()), *self.doubtful.get(v.node, ())])
        return False

    def pull(self, path: set[Node], cotangents: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        """Cotangents pulled back along the linear nodes of a path, gates held fixed; what arrives at its atoms."""
        return pull(self.graph, [n for n in self.nodes if n in path], self.linear, cotangents, self.added)


def _argument(node: Node, position: int) -> Value | None:
    """The value given for one argument of an operation; None for a constant."""
    parent, output = node.next_functions[position]
    return None if parent is None else Value(parent, output)


def _is_centred(node: Node) -> bool:
    """Whether the numbers that a product has are drawn around 0: those around 1 are a dropout, and hold a step size.

    Of w^2 - h, w normal with the variance h, most are below the mean, 0: few of them have a mean far below it.
    """
    saved = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    drawn = [t.detach().double() for t in saved if isinstance(t, Tensor) and t.grad_fn is None and t.numel() > 1]
    return all(float(t.mean()) <= _DEVIATIONS * float(t.std()) / t.numel() ** 0.5 for t in drawn)


def _alpha(node: Node) -> float:
    """The number before what an operation adds to its first input."""
    known: Any = node
    factor = getattr(known, "_saved_alpha", getattr(known, "_saved_value", 1.0))
    return float(factor) or 1.0


def _nodes_of(values: Collection[Value]) -> set[Node]:
    return {value.node for value in values}


def _is_multiple(pulled: Tensor, w: Tensor) -> bool:
    """Whether a cotangent arrived as a number times itself, entries in their places."""
    a, b = pulled.reshape(-1), w.reshape(-1)
    c = torch.vdot(b, a) / torch.vdot(b, b)
    return float((a - c * b).norm()) <= _ROUNDINGS * torch.finfo(w.dtype).eps * float(a.norm())


def pull(
    graph: Graph,
    nodes: Sequence[Node],
    allowed: Mapping[Node, Sequence[Value]],
    cotangents: Mapping[Value, Tensor],
    added: Collection[Node] = (),
) -> dict[Value, Tensor]:
    """Cotangents pulled back through some nodes, along the allowed inputs of each only.

    Args:
        graph: the recorded graph.
        nodes: in the order of the forward pass.
        allowed: the inputs of every node that cotangents may go to.
        cotangents: by value.
        added: nodes that add something to their first input; a cotangent goes to that input, and to the value
            ``Value(node, ADDED)`` that stands for the rest.

    Returns:
        The cotangents of all values that none of the nodes made.
    """
    grads = dict(cotangents)

    def give(value: Value, grad: Tensor) -> None:
        grads[value] = grads[value] + grad if value in grads else grad

    with torch.no_grad():
        for node in reversed(nodes):
            given = [grads.pop(value, None) for value in outputs_of(node)]
            rest = grads.pop(Value(node, ADDED), None)
            if rest is not None:
                for value, grad in apply_node(node, [rest / _alpha(node)], graph.inputs[node])[1:]:
                    give(value, grad)
            if all(g is None for g in given):
                continue
            if node in graph.passed and given[0] is not None:
                give(graph.inputs[node][0], given[0].reshape(meta_of(graph.inputs[node][0]).shape))
                continue
            if node in added and given[0] is not None:
                give(*apply_node(node, given, graph.inputs[node])[0])
                give(Value(node, ADDED), given[0] * _alpha(node))
                continue
            for value, grad in apply_node(node, given, list(allowed[node])):
                give(value, grad)
    return grads
