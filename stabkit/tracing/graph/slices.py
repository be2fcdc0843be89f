"""Slices of tensors that operations take one after the other, as a recurrence does of its input."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, operation

_ONE = frozenset({"Select", "Slice"})
_ALL = frozenset({"Split", "SplitWithSizes", "Unbind", "UnsafeSplit"})
_SLICES = _ONE | _ALL
_LAGS = 4  # slices of one tensor that a period takes, at most, of which one is to be seen at its distance

Piece = tuple[tuple[Value, str, int], int]  # a tensor, how it is sliced and along which dimension; which slice


class Pieces:
    """Where slices of tensors are taken, and which.

    Attributes:
        low: the first position that is looked at.
        high: the last.
    """

    def __init__(self, graph: Graph, start: int, stop: int, without: Collection[Node]) -> None:
        self._graph = graph
        self.low, self.high = start, stop
        self._taken: defaultdict[object, list[int]] = defaultdict(list)
        self._places: defaultdict[object, set[int]] = defaultdict(set)
        for rank in range(start, stop):
            node = graph.nodes[rank]
            if node in without:
                continue
            if operation(node) in _ONE:
                self._note(rank, node, "made")
            for value in graph.inputs[node]:
                if operation(value.node) in _SLICES:
                    self._note(rank, value.node, "read", value.output)

    def _note(self, rank: int, node: Node, how: str, output: int = 0) -> None:
        found = self.of(Value(node, output))
        if found is not None:
            tensor, place = found
            self._taken[how, tensor].append(rank)
            self._places[how, tensor].add(place)

    def of(self, value: Value) -> Piece | None:
        """The tensor that a value is a slice of, with the dimension, and which of its slices; None for others."""
        node: Any = value.node
        name, given = operation(node), self._graph.inputs.get(node)
        if not given:
            return None
        if name in _ALL:
            return (given[0], name, 0), value.output
        if name in _ONE:
            place = node._saved_index if name == "Select" else node._saved_start
            return (given[0], name, node._saved_dim), 0 if place is None else int(place)
        return None

    def distances(self, fewest: int, enough: int) -> set[int]:
        """How many operations lie between successive slices of one tensor, where there are enough of them.

        Args:
            fewest: slices from which on distances are looked at.
            enough: slices of which all but two have to be at a distance.
        """
        found: set[int] = set()
        for key, ranks in self._taken.items():
            count = min(len(self._places[key]), enough)
            if count < fewest:
                continue
            ordered = sorted(set(ranks))
            for lag in range(1, _LAGS + 1):
                apart = Counter(map(operator.sub, ordered[lag:], ordered))
                found.update(distance for distance, often in apart.items() if often >= max(count - 2, 2))
        return found
