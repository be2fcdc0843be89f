"""Both ends of a recurrence over time: rounds that lie outside of what repeats whole, and those that do less.

The first round may begin at constants, zeros mostly, and has fewer operations for it. A write into a buffer or a table
of which one row is left out make the first or the last round another one than those between, though the way of the
state is the same. Of the last round a part is missing where the output reads only some of its states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.slices import Piece, Pieces
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of


@dataclass(frozen=True, eq=False)
class Ends:
    """What is needed to look beyond the rounds that are wholly alike.

    Attributes:
        graph: the recorded graph.
        pieces: the slices that are taken, and the positions between which one looks.
        origin: the position of the state of round 0.
        period: operations from one state to the next.
        cycle: the places of those on the way of the state, counted from where the period begins.
        alive: the values that make up the state: place, output, and age in periods.
        place: the place at which the period is cut, so that `origin` less this is where it begins.
    """

    graph: Graph
    pieces: Pieces
    origin: int
    period: int
    cycle: set[int]
    alive: Sequence[tuple[int, int, int]]
    place: int

    def has_round(self, window: int, like: int) -> bool:
        """Whether the operations of the cycle that end in a window are those one period later (1), or earlier (-1)."""
        high = self.origin + window * self.period
        low = high - self.period
        start = low - self.place
        born = [start + place - age * self.period for place, _, age in self.alive]
        if min(low, *born) < self.pieces.low or high > self.pieces.high:
            return False
        before = min(born) - self.period
        shift = min(like, 0) * self.period
        return all(self._is_like(rank + shift, rank + shift + self.period, before) for rank in self._of_cycle(low))

    def _of_cycle(self, position: int) -> list[int]:
        """The ranks of the operations of the cycle within a period from some position on."""
        start = self.origin - self.place
        return [rank for rank in range(position, position + self.period) if (rank - start) % self.period in self.cycle]

    def _is_like(self, rank: int, later: int, before: int) -> bool:
        """Whether an operation is like a later one, and takes what that takes one period later, or made long ago."""
        graph = self.graph
        if not 0 <= rank < later < len(graph.nodes):
            return False
        one, other = graph.nodes[rank], graph.nodes[later]
        if not _are_alike(graph, one, other):
            return False
        for a, b in zip(graph.inputs[one], graph.inputs[other], strict=True):
            first, second = graph.rank.get(a.node, -1), graph.rank.get(b.node, -1)
            moved = second - first == self.period and a.output == b.output
            fixed = a.node is b.node or max(first, second) < before or self._same_tensor(a, b)
            if not (moved or fixed) or meta_of(a).shape != meta_of(b).shape:
                return False
        return True

    def _same_tensor(self, a: Value, b: Value) -> bool:
        one, other = self.pieces.of(a), self.pieces.of(b)
        return one is not None and other is not None and one[0] == other[0]

    def before(self, states: Sequence[Sequence[Value]], position: int) -> int:
        """How many rounds lead to the first state: those from constants have fewer inputs, and are not like others."""
        graph, (first, second) = self.graph, states[:2]

        def are_made_alike(values: Iterable[Value]) -> bool:
            return all(_are_of_a_kind(a, b) for a, b in zip(values, second, strict=True))

        if not are_made_alike(first):
            return 0
        made = max(Counter((place, output) for place, output, _ in self.alive).values())  # a history: a round each
        found: dict[Value, Value] = {}
        for rank in self._of_cycle(position):
            if rank - self.period < self.pieces.low:
                return made
            earlier, later = graph.nodes[rank - self.period], graph.nodes[rank]
            if not _are_alike(graph, earlier, later):
                return made
            for a, b in zip(graph.inputs[earlier], graph.inputs[later], strict=True):
                if b in first and found.setdefault(b, a) != a:
                    return made
        return made + (set(found) == set(first) and are_made_alike(found[value] for value in first))

    def after(self, last: Sequence[Value], position: int, drives: Sequence[Value]) -> int:
        """1 where the last state meets a slice that no round before has taken: a round of which not all is read."""
        graph, known = self.graph, set(last)
        taken = {self.pieces.of(v) for node in graph.nodes[self.pieces.low : position] for v in graph.inputs[node]}
        ranks = self._of_cycle(position - self.period)
        feeds = [graph.nodes[rank] for rank in ranks if self._slices_of(graph.nodes[rank], ranks, drives)]
        for rank in range(position, min(position + self.period, self.pieces.high)):
            node = graph.nodes[rank]
            if known.isdisjoint(graph.inputs[node]):
                continue
            met = self._slices_in([v for v in graph.inputs[node] if v not in known], position, drives)
            if not met <= taken and any(_are_alike(graph, node, other) for other in feeds):
                return 1
            known.update(outputs_of(node))
        return 0

    def _slices_of(self, node: Node, cycle: Sequence[int], drives: Sequence[Value]) -> set[Piece]:
        """The slices that an operation of a round takes beside the way of the state."""
        beside = [v for v in self.graph.inputs[node] if self.graph.rank.get(v.node, -1) not in cycle]
        return self._slices_in(beside, cycle[0] - self.period, drives)

    def _slices_in(self, values: list[Value], position: int, drives: Sequence[Value]) -> set[Piece]:
        """The slices of some tensors that values are, or were made of behind a position."""
        found: set[Piece] = set()
        while values:
            value = values.pop()
            piece = self.pieces.of(value)
            if piece is not None:
                found.update({piece} if piece[0][0] in drives else ())
            elif self.graph.rank.get(value.node, -1) >= position:
                values += self.graph.inputs[value.node]
        return found


def _are_alike(graph: Graph, one: Node, other: Node) -> bool:
    """Whether two operations have one name, as many inputs, and outputs of the same shapes."""
    made = outputs_of(one), outputs_of(other)
    if len(graph.inputs[one]) != len(graph.inputs[other]) or len(made[0]) != len(made[1]):
        return False
    return all(_are_of_a_kind(a, b) for a, b in zip(*made, strict=True))


def _are_of_a_kind(a: Value, b: Value) -> bool:
    return operation(a.node) == operation(b.node) and meta_of(a).shape == meta_of(b).shape
