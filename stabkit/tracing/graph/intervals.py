"""Module calls as intervals of positions on a graph, and how narrow the graph is around them."""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of
from stabkit.tracing.recording.recorder import Call

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MATRIX_OPERATIONS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "MkldnnLinear")


def numbered(path: str) -> str:
    """A path of a module with every run of digits replaced by one sign."""
    return re.sub(r"\d+", "#", path)


@dataclass(frozen=True)
class Interval:
    """One module call between two positions of the graph."""

    index: int
    parent: int
    path: str
    module: nn.Module
    start: int
    stop: int

    @cached_property
    def pattern(self) -> str:
        """The path with every run of digits replaced: blocks that repeat share it."""
        return numbered(self.path)

    @property
    def length(self) -> int:
        """Number of operations inside."""
        return self.stop - self.start


def _with_uncalled(calls: list[Interval], modules: Mapping[str, nn.Module]) -> list[Interval]:
    """Add the numbered modules whose parts are called but not they themselves, as ``layer.forward(x)`` does it."""
    known = {call.index: call for call in calls}
    groups: defaultdict[tuple[int, str], list[Interval]] = defaultdict(list)
    for call in calls:
        parent = known.get(call.parent)
        prefix = parent.path + "." if parent is not None and parent.path else ""
        parts = call.path[len(prefix) :].split(".") if call.path.startswith(prefix) else []
        digits = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        if digits:
            groups[call.parent, prefix + ".".join(parts[: digits[0] + 1])].append(call)
    added: list[Interval] = []
    moved: dict[int, int] = {}
    for (parent_index, path), members in groups.items():
        start, stop = members[0].start, members[-1].stop
        between = [c for c in calls if c.parent == parent_index and start <= c.start < stop and c not in members]
        if path in modules and len(members) >= 2 and not between:
            index = -2 - len(added)
            added.append(Interval(index, parent_index, path, modules[path], start, stop))
            moved.update({member.index: index for member in members})
    placed = [replace(call, parent=moved.get(call.index, call.parent)) for call in calls]
    return sorted([*placed, *added], key=lambda call: (call.start, -call.stop, call.index >= 0, call.index))


class Intervals:
    """The calls of a recording that contain operations of the graph, as a forest.

    Widths here are those that count when boundaries are *chosen*: values that many blocks read but none of them
    makes (an encoder's output in a decoder) are left out, and nothing inside a norm counts as wide.

    Attributes:
        calls: the calls, in the order of their beginnings.
        width: the width of the frontier at every position, as it counts for choosing.
    """

    def __init__(
        self,
        graph: Graph,
        frontiers: Frontiers,
        calls: Sequence[Call],
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.graph = graph
        self._frontiers = frontiers
        self.end = len(graph.nodes)
        placed = [
            Interval(c.index, c.parent, c.path, c.module, graph.position(c.start), graph.position(c.stop))
            for c in calls
            if c.finished
        ]
        self.calls = _with_uncalled([c for c in placed if c.length > 0], modules or {})
        known = {c.index for c in self.calls}
        self._children: defaultdict[int, list[Interval]] = defaultdict(list)
        for call in self.calls:
            self._children[call.parent if call.parent in known else -1].append(call)
        self.by_index = {c.index: c for c in self.calls}
        self._patterns: defaultdict[str, set[str]] = defaultdict(set)
        for call in self.calls:
            self._patterns[call.pattern].add(call.path)
        self.instances = Counter(type(c.module) for c in self.calls)
        self._alike = Counter(self._likeness(c) for c in self.calls)
        self._starts = [c.start for c in self.calls]
        self._weighted = self._weighted_before()
        self.width = np.array(frontiers.width)
        self._discount_context(frontiers)
        self._flatten_norms()

    @property
    def has_convolutions(self) -> bool:
        """Whether any operation is a convolution."""
        return any(operation(node).startswith("Convolution") for node in self.graph.nodes)

    def children(self, call: Interval | None) -> list[Interval]:
        """Calls made directly from a call, or the outermost ones."""
        return self._children[-1 if call is None else call.index]

    def parent(self, call: Interval) -> Interval | None:
        """The call that a call was made from."""
        return self.by_index.get(call.parent)

    def is_leaf(self, call: Interval) -> bool:
        """Whether the call made no further module calls."""
        return not self._children[call.index]

    def is_container(self, call: Interval) -> bool:
        """Whether the call does nothing but run its children, and is not itself one of several alike layers."""
        if self.is_leaf(call) or not isinstance(call.module, _CONTAINERS):
            return False
        own = call.length - sum(child.length for child in self.children(call))
        return (own == 0 or type(call.module) in _CONTAINERS) and not self._is_layer(call)

    def _is_layer(self, call: Interval) -> bool:
        """A Sequential that stands beside others of the same numbered name, and is no stack of like blocks.

        It holds plain modules (convolution, norm, activation), or one block together with such modules.
        """
        if self._alike[self._likeness(call)] < 2 or not self.has_weights(call.start, call.stop):
            return False
        blocks = [child for child in self.children(call) if not self.is_leaf(child)]
        plain = [child for child in self.children(call) if self.is_leaf(child)]
        weighty = any(p.dim() >= 2 for child in plain for p in child.module.parameters(recurse=False))
        return not blocks or (len(blocks) == 1 and weighty)

    def _likeness(self, call: Interval) -> tuple[int, type, str]:
        """What calls from one parent have in common when they stand beside each other as like items."""
        return call.parent if call.parent in self.by_index else -1, type(call.module), call.pattern

    def enclosing(self, start: int, stop: int) -> Iterator[Interval]:
        """The calls that hold a stretch, the innermost first."""
        last = bisect.bisect_right(self._starts, start) - 1
        call = self.calls[last] if last >= 0 else None
        while call is not None:  # calls are nested: what holds the stretch is the last one begun, or was open then
            if call.start <= start and stop <= call.stop:
                yield call
            call = self.parent(call)

    def repeats(self, call: Interval) -> bool:
        """Whether there are other calls of its class, or other modules of the same numbered name."""
        return self.instances[type(call.module)] > 1 or ("#" in call.pattern and len(self._patterns[call.pattern]) > 1)

    def passing_by(self, position: int, before: Interval, after: Interval) -> int:
        """How many values alive between two calls are older than the first and outlive the second without being used.

        The first may have read them: a skip to a decoder starts at the input of some block.
        """
        used = {v for node in self.graph.nodes[before.stop : after.stop] for v in self.graph.inputs[node]}
        born, last = self._frontiers.born, self._frontiers.last_use
        alive = self._frontiers.at(position)
        return sum(born[v] <= before.start and last[v] >= after.stop and v not in used for v in alive)

    def taken_by(self, position: int, after: Interval) -> int:
        """How many values alive before a call do not just pass it by: they are used in it, or end there."""
        used = {v for node in self.graph.nodes[position : after.stop] for v in self.graph.inputs[node]}
        last = self._frontiers.last_use
        return sum(v in used or last[v] < after.stop for v in self._frontiers.at(position))

    def reads(self, call: Interval, before: Interval) -> bool:
        """Whether what a call reads is made of what an earlier one made."""
        made = {v for node in self.graph.nodes[before.start : before.stop] for v in outputs_of(node)}
        for node in self.graph.nodes[before.stop : call.stop]:
            if not made.isdisjoint(self.graph.inputs[node]):
                if self.graph.rank[node] >= call.start:
                    return True
                made.update(outputs_of(node))
        return False

    def made_in(self, before: Interval, position: int) -> int:
        """How many values alive at a position behind a call were not there before it."""
        return sum(self._frontiers.born[v] > before.start for v in self._frontiers.at(position))

    def items(self, call: Interval | None) -> list[Interval]:
        """Children with containers opened, so that items of nested Sequentials stand side by side."""
        found: list[Interval] = []
        for child in self.children(call):
            found.extend(self.items(child) if self.is_container(child) else [child])
        return found

    def shapes(self, position: int) -> list[tuple[int, ...]]:
        """Shapes of the values alive at a position."""
        return [meta_of(value).shape for value in self._frontiers.at(position)]

    def renewed(self, before: int, after: int) -> int:
        """How many values are alive at one position that were not at an earlier one."""
        old = set(self._frontiers.at(before))
        return sum(value not in old for value in self._frontiers.at(after))

    def base(self, start: int, stop: int) -> int:
        """The narrowest width between two positions."""
        return int(self.width[start : stop + 1].min())

    def is_wide(self, start: int, stop: int) -> bool:
        """Whether some position strictly inside is wider than both ends allow: a branch, not a plain layer."""
        inside = self.width[start + 1 : stop]
        return bool(inside.size) and int(inside.max()) > min(int(self.width[start]), int(self.width[stop]))

    def is_narrow_to_narrow(self, call: Interval) -> bool:
        """Whether a call begins and ends where the graph is as narrow as anywhere within it."""
        base = self.base(call.start, call.stop)
        return int(self.width[call.start]) <= base and int(self.width[call.stop]) <= base

    def wide_regions(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Maximal stretches between narrow positions, such as residual branches with their skip."""
        base = self.base(start, stop)
        regions, begin, previous = [], None, start
        for position in range(start + 1, stop + 1):
            if position < stop and self.width[position] > base:
                begin = previous if begin is None else begin
                continue
            if begin is not None:
                regions.append((begin, position))
                begin = None
            previous = position
        return regions

    def operations(self, start: int, stop: int) -> Counter[str]:
        """How often each operation occurs between two positions."""
        return Counter(operation(node) for node in self.graph.nodes[start:stop])

    def has_weights(self, start: int, stop: int) -> bool:
        """Whether a stretch multiplies by a weight matrix or a kernel, rather than only norms and activations."""
        if self._weighted[stop] > self._weighted[start]:
            return True
        return any(operation(node).startswith(_MATRIX_OPERATIONS) for node in self.graph.nodes[start:stop])

    def _weighted_before(self) -> list[int]:
        """For every position how many operations before it lie in modules with weight matrices of their own."""
        inside = np.zeros(self.end, dtype=np.int64)
        for call in self.calls:
            if self.is_leaf(call) and any(p.dim() >= 2 for p in call.module.parameters(recurse=False)):
                inside[call.start : call.stop] = 1
        return [0, *itertools.accumulate(inside.tolist())]

    def _discount_context(self, frontiers: Frontiers) -> None:
        """Leave out values that several calls of one class under one parent read and none of them makes."""
        for value, consumers in frontiers.consumers.items():
            born, last = frontiers.born[value], frontiers.last_use[value]
            uses = [self.graph.rank[node] for node in consumers]
            if max(uses) - born < 4:
                continue
            readers: defaultdict[tuple[int, type], set[int]] = defaultdict(set)
            for call in itertools.chain.from_iterable(self.enclosing(use, use + 1) for use in uses):
                if call.start >= born and not isinstance(call.module, _CONTAINERS):
                    readers[call.parent, type(call.module)].add(call.index)
            if any(self._is_context_of(group, value) for group in readers.values()):
                self.width[born : last + 1] = np.maximum(1, self.width[born : last + 1] - 1)

    def _is_context_of(self, group: set[int], value: Value) -> bool:
        """Whether a value lives through several calls of one class and is read in one that reads others besides.

        Parallel branches read their common input too, but nothing else.
        """
        readers = [self.by_index[index] for index in sorted(group)]
        born, last = self._frontiers.born[value], self._frontiers.last_use[value]
        siblings = self._children[readers[0].parent if readers[0].parent in self.by_index else -1]
        first = bisect.bisect_left(siblings, born, key=lambda call: call.start)
        lasting = itertools.takewhile(lambda call: call.start <= last, itertools.islice(siblings, first, None))
        alike = [call for call in lasting if type(call.module) is type(readers[0].module)]
        outlived = any(last >= call.stop for call in alike)
        if len(alike) < 2 or self.is_leaf(readers[0]) or not outlived:
            return False
        return any(self._taken(call) - {value} for call in readers)

    def _taken(self, call: Interval) -> set[Value]:
        """The values from before a call that are used in it."""
        used = {v for node in self.graph.nodes[call.start : call.stop] for v in self.graph.inputs[node]}
        return {v for v in used if self._frontiers.born[v] <= call.start}

    def _flatten_norms(self) -> None:
        """Inside a leaf module without weight matrices (norms, gates, softmax) nothing counts as wide."""
        for call in self.calls:
            weighty = any(p.dim() >= 2 for p in call.module.parameters(recurse=False))
            parent = self.parent(call)
            if self.is_leaf(call) and not weighty and parent is not None:
                ends = max(self.width[call.start], self.width[call.stop])
                inside = slice(call.start + 1, call.stop)
                self.width[inside] = np.minimum(self.width[inside], ends)
