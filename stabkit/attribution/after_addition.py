"""What follows the addition in a step: activations that mask, and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing import Step
from stabkit.tracing.nodes import apply_node
from stabkit.tracing.products import Products
from stabkit.tracing.segments import Segment
from stabkit.tracing.values import Value, meta_of
from stabkit.vocabulary import is_activation, norm_of


@dataclass(frozen=True)
class Tail:
    """The last operations of a step, T in J = T K, each with one input and one output of one shape.

    Attributes:
        nodes: in forward order.
        merged: the value that they start from.
    """

    nodes: tuple[Node, ...]
    merged: Value

    @property
    def is_diagonal(self) -> bool:
        """Whether every operation acts on each coordinate alone."""
        return not any(norm_of(node) for node in self.nodes)


def tail_of(step: Step) -> Tail | None:
    """The activations and norms at the end of a step; None when there are none, or when they are all of it."""
    segment = step.segment
    if len(segment.target) != 1 or len(segment.source) != 1:
        return None
    inside, found, value = set(segment.nodes), [], segment.target[0]
    while value != segment.source[0] and value.node in inside:
        node, inputs = value.node, set(segment.graph.inputs[value.node])
        known = is_activation(node) or norm_of(node)
        if not known or len(inputs) != 1:
            break
        before = next(iter(inputs))
        if meta_of(before).shape != meta_of(value).shape:
            break
        found.append(node)
        value = before
    return Tail(tuple(reversed(found)), value) if found else None


def pull_through(tail: Tail, step: Step, columns: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """T^T v for test cotangents, and their energy after each operation on the way.

    Args:
        tail: the operations behind the addition of the step.
        step: differentiated before, so that its saved tensors are at hand.
        columns: ``(batch, m, k)``.

    Returns:
        ``(batch, m, k)``, and pairs of ``"mask"`` or ``"norm"`` and an energy ``(batch, k)``, last operation first.
    """
    space = step.target.space
    pieces = list(space.unflatten(columns)[0])
    value = step.segment.target[0]
    energy: list[tuple[str, Tensor]] = []
    images = columns
    for node in reversed(tail.nodes):
        before = step.segment.graph.inputs[node][0]
        with torch.no_grad():
            pieces = [_apply(node, value, before, piece) for piece in pieces]
        images = space.flatten([torch.stack(pieces)])
        energy.append(("norm" if norm_of(node) else "mask", images.double().square().sum(1)))
        value = before
    return images, energy


def _apply(node: Node, value: Value, before: Value, cotangent: Tensor) -> Tensor:
    given: list[Tensor | None] = [None] * len(node._input_metadata)
    given[value.output] = cotangent
    for parent, grad in apply_node(node, given, [before]):
        if parent == before:
            return grad
    return torch.zeros_like(cotangent)


def body(tail: Tail, step: Step) -> Products:
    """Products with K, the step without its tail."""
    segment = step.segment
    stop = segment.graph.rank[segment.nodes[-1]] + 1 - len(tail.nodes)
    start = stop - (len(segment.nodes) - len(tail.nodes))
    inner = Segment(segment.graph, segment.source, (tail.merged,), start, stop)
    return Products(inner, step.source.space, step.target.space)
