"""Activations and norms among recorded operations: one operation each, or all operations of one call of a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.tracing.graph.values import Value, meta_of
from stabkit.tracing.products.node_derivatives import Cotangents, apply_node
from stabkit.vocabulary import ActivationFacts, NormFacts, activation_of, is_python_node, norm_of, operation

if TYPE_CHECKING:
    from stabkit.tracing.graph.graph import Graph
    from stabkit.tracing.recording.recorder import Call


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
                grads: Cotangents = [given.pop(Value(node, i), None) for i in range(len(node._input_metadata))]
                if all(grad is None for grad in grads):
                    continue
                for value, grad in apply_node(node, grads, graph.inputs[node]):
                    given[value] = given[value] + grad if value in given else grad
        meta = meta_of(self.source)
        found = given.get(self.source)
        return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if found is None else found


def element_of(graph: Graph, node: Node) -> Element | None:
    """The activation or norm that an operation is, or is a part of; None where it is none."""
    whole = graph.composites.get(node)
    if whole is not None:
        return whole
    inputs = set(graph.inputs[node])
    facts = (activation_of(node) or norm_of(node)) if len(inputs) == 1 else None
    return None if facts is None else Element(facts, (node,), next(iter(inputs)), Value(node, 0))


def composites_of(graph: Graph, calls: Sequence[Call]) -> dict[Node, Element]:
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
        made = {value for node in nodes for value in _outputs(node) if last_read.get(value, 0) >= stop}
        if len(sources) != 1 or len(made) != 1:
            continue
        source, target = sources.pop(), made.pop()
        facts = activation_of(call.module) or norm_of(call.module)
        if facts is not None and meta_of(source).shape == meta_of(target).shape:
            found.update(dict.fromkeys(nodes, Element(facts, nodes, source, target, call.module)))
    return found


def _outputs(node: Node) -> list[Value]:
    return [Value(node, i) for i in range(len(node._input_metadata))]
