"""What follows the addition in a step: activations that mask, and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.tracing import Step
from stabkit.tracing.graph.graph import Element, element_of
from stabkit.tracing.graph.values import Value, meta_of
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.products.step_products import Products
from stabkit.vocabulary import NormFacts


@dataclass(frozen=True)
class Tail:
    """The last operations of a step, T in J = T K, each with one input and one output of one shape.

    Attributes:
        elements: in forward order.
        merged: the value that they start from.
    """

    elements: tuple[Element, ...]
    merged: Value

    @property
    def is_diagonal(self) -> bool:
        """Whether every operation acts on each coordinate alone."""
        return not any(isinstance(element.facts, NormFacts) for element in self.elements)


def tail_of(step: Step) -> Tail | None:
    """The activations and norms at the end of a step; None when there are none, or when they are all of it."""
    segment = step.segment
    if len(segment.target) != 1 or len(segment.source) != 1:
        return None
    inside, found, value = set(segment.nodes), list[Element](), segment.target[0]
    while value != segment.source[0] and value.node in inside:
        element = element_of(segment.graph, value.node)
        if element is None or element.target != value or not inside.issuperset(element.nodes):
            break
        if meta_of(element.source).shape != meta_of(value).shape:
            break
        found.append(element)
        value = element.source
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
    energy: list[tuple[str, Tensor]] = []
    images = columns
    for element in reversed(tail.elements):
        pieces = [element.pull(step.segment.graph, piece) for piece in pieces]
        images = space.flatten([torch.stack(pieces)])
        kind = "norm" if isinstance(element.facts, NormFacts) else "mask"
        energy.append((kind, images.double().square().sum(1)))
    return images, energy


def body(tail: Tail, step: Step) -> Products:
    """Products with K, the step without its tail."""
    segment = step.segment
    behind = sum(len(element.nodes) for element in tail.elements)
    stop = segment.graph.rank[segment.nodes[-1]] + 1 - behind
    start = stop - (len(segment.nodes) - behind)
    inner = Segment(segment.graph, segment.source, (tail.merged,), start, stop)
    return Products(inner, step.source.space, step.target.space)
