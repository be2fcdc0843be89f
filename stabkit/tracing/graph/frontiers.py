"""Live frontiers: the values that everything later needs, at every position of a graph."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable

from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value

_SPACING = 64  # positions between two frontiers that are kept


class Frontiers:
    """For every position the values born before it and used at or after it.

    The frontier at *any* position is an exact state: everything later depends on the source through it alone. A
    frontier of width 1 is a cut of the graph.

    Attributes:
        width: ``width[t]`` is the number of values in the frontier at position ``t``.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        consumers: defaultdict[Value, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for value in dict.fromkeys(graph.inputs[node]):
                consumers[value].append(node)
        end = len(graph.nodes)
        self.born = {value: graph.rank.get(value.node, -1) + 1 for value in [*consumers, *graph.targets]}
        self.last_use = {value: max(graph.rank[node] for node in nodes) for value, nodes in consumers.items()}
        self.last_use.update(dict.fromkeys(graph.targets, end))
        self.consumers = dict(consumers)
        self.width = self._widths(end)
        self._in_order = sorted(self.born, key=lambda value: (self.born[value], value.output))
        self._kept = self._frontiers(end)

    def at(self, position: int) -> tuple[Value, ...]:
        """The frontier at a position, in the order of birth."""
        older, count = self._kept[position // _SPACING]
        until = bisect.bisect_right(self._in_order, position, key=self.born.__getitem__)
        return tuple(self._alive((*older, *self._in_order[count:until]), position))

    def readers(self, position: int, since: int) -> int:
        """How often the values at a position that were made after another are read from there on."""
        made = [value for value in self.at(position) if self.born[value] > since]
        return sum(self._graph.rank[node] >= position for value in made for node in self.consumers.get(value, ()))

    def _alive(self, values: Iterable[Value], position: int) -> list[Value]:
        return [value for value in values if position <= self.last_use[value]]

    def _frontiers(self, end: int) -> list[tuple[tuple[Value, ...], int]]:
        """The frontier at every 64th position, and how many values were born until there.

        So any other costs what is alive at it, and not a look at all values of the graph, of which there are as many
        as there are layers.
        """
        kept: list[tuple[tuple[Value, ...], int]] = []
        live: list[Value] = []
        count = 0
        for position in range(0, end + 1, _SPACING):
            while count < len(self._in_order) and self.born[self._in_order[count]] <= position:
                live.append(self._in_order[count])
                count += 1
            live = self._alive(live, position)
            kept.append((tuple(live), count))
        return kept

    def cuts(self) -> list[int]:
        """Positions where one value carries everything; for each such value the latest position."""
        latest: dict[Value, int] = {}
        for position, width in enumerate(self.width):
            if width == 1:
                latest[self.at(position)[0]] = position
        return sorted(latest.values())

    def _widths(self, end: int) -> list[int]:
        change = [0] * (end + 2)
        for value, born in self.born.items():
            change[born] += 1
            change[self.last_use[value] + 1] -= 1
        widths, live = [], 0
        for position in range(end + 1):
            live += change[position]
            widths.append(live)
        return widths
