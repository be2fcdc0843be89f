"""Unit cotangents pulled back: where one meets a linear layer, the layer's weight is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of
from stabkit.tracing.products.segments import Segment

# which input of a product is the first factor
_PLACES = {"AddmmBackward0": 1, "MmBackward0": 0, "BmmBackward0": 0}


class Linear(NamedTuple):
    """A product with a constant matrix: rows of inputs times ``(inputs, outputs)``, times a factor."""

    position: int
    node: Node
    argument: Value
    factor: float


def linear_nodes(segment: Segment) -> list[Linear]:
    """The nodes of a segment that multiply with a constant matrix, in time order."""
    found = (_as_linear(position, node, segment.graph) for position, node in enumerate(segment.nodes))
    return [linear for linear in found if linear is not None]


def _as_linear(position: int, node: Node, graph: Graph) -> Linear | None:
    place = _PLACES.get(type(node).__name__)
    if place is None:
        return None
    parent, output = node.next_functions[place]
    if parent is None or graph.inputs[node] != [Value(parent, output)]:
        return None  # the other factor, or the summand, depends on the state as well
    return Linear(position, node, Value(parent, output), float(getattr(node, "_saved_alpha", 1)))


class UnitPuller:
    """Cotangents that start as unit vectors, pulled back through a segment.

    As long as a cotangent has at most one entry in every row of a linear layer's output, its product with the weight is
    a row of the weight. Whether it has is looked at for every block of cotangents; the layers before the first one
    where it has not are multiplied with as usual.

    Args:
        segment: the nodes.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        stop = len(segment.nodes)
        self._stages: list[tuple[Segment, Linear]] = []
        for linear in reversed(linear_nodes(segment)):
            self._stages.append((segment.part(linear.position + 1, stop), linear))
            stop = linear.position
        self._first = segment.part(0, stop)

    @property
    def n_read(self) -> int:
        """How many layers' weights are read off; known after the first block of cotangents."""
        return len(self._stages)

    def __call__(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the target's tensors, stacked along a new first dimension, to those of the source's."""
        stacked = list(cotangents)
        for number, (after, linear) in enumerate(self._stages):
            arrived = dict(zip(after.source, after.vjp_batch(stacked), strict=True))
            output = Value(linear.node, 0)
            pulled = _read_off(linear, arrived[output])
            if pulled is None:
                return self._multiply_from(number, arrived)
            del arrived[output]
            argument = linear.argument
            arrived[argument] = arrived[argument] + pulled if argument in arrived else pulled
            following = self._stages[number + 1][0] if number + 1 < len(self._stages) else self._first
            stacked = [arrived[value] for value in following.target]
        return self._first.vjp_batch(stacked)

    def _multiply_from(self, number: int, arrived: dict[Value, Tensor]) -> list[Tensor]:
        """Go on without reading weights, now and for the blocks to come."""
        read, position = self._stages[:number], self._stages[number][1].position
        self._first = self.segment.part(0, read[-1][1].position if read else len(self.segment.nodes))
        self._stages = read
        before = self.segment.part(0, position + 1)
        return before.vjp_batch([arrived[value] for value in before.target])


def _read_off(linear: Linear, cotangents: Tensor) -> Tensor | None:
    """The cotangents ``(k, rows, outputs)`` times the weight; None if some row has more than one entry."""
    if bool((cotangents[0].count_nonzero(-1) > 1).any()):  # settles most cases
        return None
    present = cotangents != 0
    if bool((present.sum(-1) > 1).any()):
        return None
    saved: Any = linear.node
    weight: Tensor = saved._saved_mat2.detach().transpose(-2, -1)  # (outputs, inputs), or one for every batch index
    # of a row without entries the first one is taken, which is zero
    which = present.to(torch.uint8).argmax(-1)
    entries = cotangents.gather(-1, which.unsqueeze(-1)) * linear.factor
    if weight.dim() == 2:
        rows = weight.index_select(0, which.flatten()).view(*which.shape, -1)
    else:
        rows = weight[torch.arange(len(weight), device=weight.device)[:, None], which]
    return rows.mul_(entries).to(meta_of(linear.argument).dtype)
