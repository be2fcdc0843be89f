"""Recurrences over time inside a recorded forward pass: stretches of the graph that repeat, fed by slices of a tensor.

A scan that is written as a loop leaves one period of operations after another: ``h = a[:, t] * h + b[:, t]``. It is
found by that, and not by any name: operations of one kind, with the same parameters and connected alike, come again and
again at one distance; each time they take the next slice of some tensor; and some of them form a cycle through time,
since what one period makes enters the next. That cycle, a strongly connected part of the period, is the chain of
states. What is only summed up, written to a buffer or computed for each time alone is none.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.scan_ends import Ends
from stabkit.tracing.graph.slices import Piece, Pieces
from stabkit.tracing.graph.values import Value, meta_of, metas_of, operation
from stabkit.vocabulary import moves

FEWEST = 8  # time steps from which one speaks of time, whatever they do
_ROUNDS = FEWEST - 1  # of them that are alike at least: the first may begin at constants, and do less
FEWEST_ALIKE = 3  # those from which one does where each round multiplies its state by the same tensors
_MOVES = moves()
_SUMS = frozenset({"Add", "Addcmul", "Sub"})
_PRODUCTS = frozenset({"Addcmul", "Baddbmm", "Bmm", "Lerp", "Mm", "Mul"})

Kinds = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Scan:
    """A recurrence over time inside a forward pass.

    Attributes:
        states: for every time the values that are carried on, in the order of their birth; the same for all times.
        positions: where in the graph each of these states is complete.
        cycle: the operations between two states, in the middle of the sequence, that lie on the way of the state.
        drives: the tensors of which each time takes another slice.
        period: how many operations lie between two states.
        taps: slices of one tensor that are added to the state in a time step: 2 where the input of the time before
            enters as well.
        before: time steps that lead to the first of the states, that from constants with them, which does less.
        after: time steps that follow the last of them, one that does less with them, since not all of it is read.
        width: how many entries of the sequence each takes at once: more than one of chunks.
    """

    states: tuple[tuple[Value, ...], ...]
    positions: tuple[int, ...]
    cycle: tuple[Node, ...]
    drives: tuple[Value, ...]
    period: int
    taps: int = 1
    before: int = 0
    after: int = 0
    width: int = 1

    def __len__(self) -> int:
        return len(self.states) - 1

    @property
    def n_steps(self) -> int:
        """How many time steps there are, with those at both ends that are not like the others."""
        return self.before + len(self) + self.after

    @property
    def middle(self) -> int:
        """The time of the state before the operations of `cycle`."""
        return (len(self.states) - 1) // 2


def scans_between(
    graph: Graph,
    start: int,
    stop: int,
    parameters: Iterable[Tensor] = (),
    prefetch: Callable[[], None] | None = None,
    fewest: int = FEWEST_ALIKE,
    without: Collection[Node] = (),
) -> tuple[Scan, ...]:
    """The recurrences between two positions of a graph, in the order of their beginnings.

    They run over eight time steps or more, or over three or more that use the same parameters each or multiply the
    state by what the slices give.
    The work grows with the number of operations, not with its square.

    Args:
        graph: the recorded graph.
        start: the first position.
        stop: the last position.
        parameters: parameters and buffers of the model, read once and only where a state goes round: to read all of
            them for each step would cost the square of the depth. What uses other parameters each time is no
            recurrence.
        prefetch: called before saved tensors are looked at, to bring back those that were forgotten.
        fewest: rounds of a recurrence.
        without: operations whose slices are not looked at.
    """
    pieces = Pieces(graph, start, stop, without)
    periods = pieces.distances(FEWEST_ALIKE, FEWEST)
    if not periods:
        return ()
    if prefetch is not None:
        prefetch()
    kinds = _kinds(graph, start, stop)

    @cache
    def storages() -> set[int]:
        return {p.untyped_storage().data_ptr() for p in parameters if p.layout == torch.strided and not p.is_meta}

    found: list[tuple[int, Scan]] = []
    taken: list[tuple[int, int]] = []
    # the longer first: a few rounds that look alike may lie inside of one of theirs
    for least, period in itertools.product(sorted({_ROUNDS, fewest}, reverse=True), sorted(periods)):
        for low, high in _stretches(kinds[:-period] == kinds[period:], least * period - period):
            run = _Run(graph, pieces, start + low, start + high + period, period, storages)
            if any(run.start < b and a < run.stop for a, b in taken):
                continue
            chains = list(run.chains(least))
            if chains:
                taken.append((run.start, run.stop))
                found += [(run.start, scan) for scan in chains]
    return tuple(scan for _, scan in sorted(found, key=lambda pair: pair[0]))


def _kinds(graph: Graph, start: int, stop: int) -> Kinds:
    """A number for every operation, the same for those of one name, shape and number of inputs."""
    numbers: dict[object, int] = {}
    kinds = []
    for node in graph.nodes[start:stop]:
        shapes = tuple(meta.shape for meta in metas_of(node))
        key = (operation(node), len(graph.inputs[node]), shapes)
        kinds.append(numbers.setdefault(key, len(numbers)))
    return np.array(kinds, dtype=np.int64)


def _stretches(same: np.ndarray[Any, np.dtype[np.bool_]], least: int) -> Iterator[tuple[int, int]]:
    """Where a row of truths of some length begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    for low, high in edges.reshape(-1, 2).tolist():
        if high - low >= max(least, 1):
            yield low, high


@dataclass(frozen=True, eq=False)
class _Edge:
    """A value that one operation of a period hands to another, or to itself, some periods later."""

    giver: int
    output: int
    taker: int
    lag: int


class _Run:
    """Operations that repeat at one distance.

    Attributes:
        start: rank of the first that repeats with what it takes.
        stop: one past the last.
    """

    def __init__(
        self, graph: Graph, pieces: Pieces, start: int, stop: int, period: int, storages: Callable[[], set[int]]
    ) -> None:
        self._graph, self._pieces, self._period, self._storages = graph, pieces, period, storages
        self._first = start
        agree = np.array([self._agree(rank) for rank in range(start, stop - period)], dtype=bool)
        longest = max(_stretches(agree, 1), key=lambda pair: pair[1] - pair[0], default=(0, 0))
        self.start, self.stop = start + longest[0], start + longest[1] + period
        self.count = (self.stop - self.start) // period

    def _rank(self, value: Value) -> int:
        return self._graph.rank.get(value.node, -1)

    def _agree(self, rank: int) -> bool:
        """Whether an operation takes what its like one period later takes, one period earlier."""
        graph, period = self._graph, self._period
        for a, b in zip(graph.inputs[graph.nodes[rank]], graph.inputs[graph.nodes[rank + period]], strict=True):
            before, after = self._rank(a), self._rank(b)
            if after - before == period and a.output == b.output:
                continue
            outside = before < self._first and after < self._first
            if not (outside or a.node is b.node or self._same_tensor(a, b)):
                return False
        return True

    def _same_tensor(self, a: Value, b: Value) -> bool:
        one, other = self._pieces.of(a), self._pieces.of(b)
        return one is not None and other is not None and one[0] == other[0]

    def chains(self, fewest: int) -> Iterator[Scan]:
        """The cycles through time, each with its states; of fewer than eight rounds see `scans_between`."""
        if self.count < fewest:
            return
        edges = self._edges()
        drives, cycles = self._drives(), _cycles(edges)
        carried = set[int]().union(*cycles)
        for cycle in cycles:
            nodes = [self._node(self.count // 2, place) for place in cycle]
            if all(operation(node) in _MOVES for node in nodes) or not self._same_parameters(cycle):
                continue
            above = _reached([*cycle], _turned(edges))
            if self.count < _ROUNDS and not (self._uses_again(cycle) or self._is_multiplied(cycle, edges, drives)):
                continue
            tensors = tuple(dict.fromkeys(tensor for place in above for tensor in drives.get(place, ())))
            if tensors:
                yield self._scan(cycle, [e for e in edges if {e.giver, e.taker} <= cycle], edges, tensors, carried)

    def _node(self, window: int, place: int) -> Node:
        return self._graph.nodes[self.start + window * self._period + place]

    def _edges(self) -> list[_Edge]:
        """What the operations of a late period take of their own and of earlier periods."""
        inputs, last = self._graph.inputs, self.count - 1
        found = []
        for taker in range(self._period):
            pairs = zip(inputs[self._node(last - 1, taker)], inputs[self._node(last, taker)], strict=True)
            for before, value in pairs:
                rank = self._rank(value)
                if rank >= self.start and rank - self._rank(before) == self._period:
                    periods, giver = divmod(rank - self.start, self._period)
                    found.append(_Edge(giver, value.output, taker, last - periods))
        return found

    def _drives(self) -> dict[int, list[Value]]:
        """The operations of a period that take the next slice of a tensor each time, with these tensors."""
        found: dict[int, list[Value]] = {}
        for place in range(self._period):
            own = [self._pieces.of(Value(self._node(w, place), 0)) for w in range(self.count)]
            rows = [own, *zip(*(self._taken_pieces(w, place) for w in range(self.count)), strict=False)]
            for row in rows:
                known = [piece for piece in row if piece is not None]
                if len(known) < self.count or len({tensor for tensor, _ in known}) != 1:
                    continue
                apart = {b - a for (_, a), (_, b) in itertools.pairwise(known)}
                if len(apart) == 1 and 0 not in apart:
                    found.setdefault(place, []).append(known[0][0][0])
        return found

    def _taken_pieces(self, window: int, place: int) -> list[Piece | None]:
        return [self._pieces.of(value) for value in self._graph.inputs[self._node(window, place)]]

    def _same_parameters(self, cycle: set[int]) -> bool:
        """Whether the operations of a cycle use the same parameters each time."""
        storages = self._storages()
        for place in cycle:
            if len({_parameters_of(self._node(window, place), storages) for window in range(self.count)}) > 1:
                return False
        return True

    def _uses_again(self, cycle: set[int]) -> bool:
        """Whether an operation of a cycle uses the same tensor, of more than one number, each time."""
        for place in cycle:
            saved = [_saved_by(self._node(window, place)) for window in range(self.count)]
            if set.intersection(*map(set, saved)):
                return True
        return False

    def _is_multiplied(self, cycle: set[int], edges: Sequence[_Edge], drives: Mapping[int, object]) -> bool:
        """Whether an operation of a cycle multiplies the state by what is made of the slices that each time takes.

        Rounds that only add their slices, or that convolve them, say nothing of time where they are few.
        """
        above = _turned(edges)
        for place in cycle:
            if operation(self._node(self.count // 2, place)) in _PRODUCTS:
                others = [giver for giver in above.get(place, ()) if giver not in cycle]
                if place in drives or any(giver in drives for giver in _reached(others, above) - cycle):
                    return True
        return False

    def _taps(self, nodes: Collection[Node], carried: set[int]) -> int:
        """How many slices of one tensor some operations add to the state: those of its way from one time to the next.

        What is ``carried`` from one period to the next, in another cycle, holds slices of all times before.
        """
        inputs, found = self._graph.inputs, defaultdict(set)
        stack = [value for node in nodes if operation(node) in _SUMS for value in inputs[node]]
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            piece = self._pieces.of(value)
            if piece is not None:
                found[piece[0]].add(piece[1])
            elif value not in seen and (rank := self._rank(value)) >= max(self.start - self._period, 0):
                seen.add(value)
                if (rank - self.start) % self._period not in carried:
                    stack.extend(inputs.get(value.node, ()))
        return max(map(len, found.values()), default=1)

    def _width(self, drives: Collection[Value]) -> int:
        """How many entries of the sequence the slices in the middle take, the least of all."""
        found = []
        for place in range(self._period):
            node = self._node(self.count // 2, place)
            for value in (Value(node, 0), *self._graph.inputs[node]):
                if operation(value.node) == "Slice" and (piece := self._pieces.of(value)) and piece[0][0] in drives:
                    sliced: Any = value.node
                    found.append(meta_of(value).shape[sliced._saved_dim])
                elif operation(value.node) != "Slice" and (piece := self._pieces.of(value)) and piece[0][0] in drives:
                    found.append(1)
        return min(found, default=1)

    def _scan(
        self, cycle: set[int], inner: list[_Edge], edges: list[_Edge], drives: tuple[Value, ...], carried: set[int]
    ) -> Scan:
        beyond = {(e.giver, e.output) for e in edges if e.giver in cycle and e.taker not in cycle}
        for node in self._graph.nodes[self.stop :]:
            for value in self._graph.inputs[node]:
                rank = self._rank(value)
                if self.start <= rank < self.stop:
                    beyond.add(((rank - self.start) % self._period, value.output))
        places = {place + 1: _alive(inner, place + 1, self._period) for place in cycle}

        def cost(end: int) -> tuple[int, int, int, int]:
            numel = sum(meta_of(Value(self._node(1, place), out)).numel for place, out, _ in places[end])
            return len(places[end]), numel, -len({(p, o) for p, o, _ in places[end]} & beyond), -end

        end = min(places, key=cost)
        alive = sorted(places[end], key=lambda v: (v[0] - v[2] * self._period, v[1]))
        oldest = max(age for *_, age in alive)
        windows = [w for w in range(oldest, self.count) if self.start + w * self._period + end <= self.stop]

        def state(window: int) -> tuple[Value, ...]:
            return tuple(Value(self._node(window - age, place), output) for place, output, age in alive)

        states = tuple(map(state, windows))
        positions = tuple(self.start + w * self._period + end for w in windows)
        middle = (len(windows) - 1) // 2
        low, high = positions[middle], positions[middle + 1]
        passed = tuple(
            self._graph.nodes[rank] for rank in range(low, high) if (rank - self.start) % self._period in cycle
        )
        ends = Ends(self._graph, self._pieces, self.start + end, self._period, cycle, alive, end)
        first, last = windows[0], windows[-1]
        while ends.has_round(first, like=1):
            first -= 1
        while ends.has_round(last + 1, like=-1):
            last += 1
        outer = (state(first), state(first + 1)), state(last)
        before = windows[0] - first + ends.before(outer[0], self.start + first * self._period + end)
        after = last - windows[-1] + ends.after(outer[1], self.start + last * self._period + end, drives)
        return Scan(states, positions, passed, drives, self._period, self._taps(passed, carried), before, after,
                    self._width(drives))  # fmt: skip


@cache
def _saved_names(kind: type[Node]) -> tuple[str, ...]:
    names = dir(kind)
    return tuple(name for name in names if name.startswith("_saved_") and f"_raw{name}" in names)


def _saved_by(node: Node) -> dict[tuple[str, int], Tensor]:
    """The tensors of more than one number that an operation keeps for its derivative, by name and address.

    An address is that of one tensor while that is alive: hooks of the user's may unpack a new one at each call.
    """
    saved = ((name, getattr(node, name)) for name in _saved_names(type(node)) if not name.startswith("_saved_result"))
    return {(name, t.data_ptr()): t for name, t in saved if isinstance(t, Tensor) and t.numel() > 1 and not t.is_meta
            and t.layout == torch.strided}  # fmt: skip


def _parameters_of(node: Node, storages: set[int]) -> tuple[tuple[str, int], ...]:
    found = []
    for name in _saved_names(type(node)):
        saved = getattr(node, name)
        known = isinstance(saved, Tensor) and saved.layout == torch.strided and not saved.is_meta
        if known and saved.untyped_storage().data_ptr() in storages:
            found.append((name, saved.data_ptr()))
    return tuple(found)


def _alive(edges: Sequence[_Edge], end: int, period: int) -> set[tuple[int, int, int]]:
    """The values that cross the place before operation ``end`` of a period: giver, output, and age in periods."""
    found = set()
    for edge in edges:
        age = 0 if edge.giver < end else 1
        while end + age * period <= edge.taker + edge.lag * period:
            found.add((edge.giver, edge.output, age))
            age += 1
    return found


def _turned(edges: Sequence[_Edge]) -> dict[int, list[int]]:
    """From every operation to those that it takes something of."""
    found: dict[int, list[int]] = defaultdict(list)
    for edge in edges:
        found[edge.taker].append(edge.giver)
    return found


def _forward(edges: Sequence[_Edge]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for edge in edges:
        found[edge.giver].append(edge.taker)
    return found


def _reached(starts: Sequence[int], ways: Mapping[int, Sequence[int]]) -> set[int]:
    found, stack = set(starts), list(starts)
    while stack:
        for place in ways.get(stack.pop(), ()):
            if place not in found:
                found.add(place)
                stack.append(place)
    return found


def _cycles(edges: Sequence[_Edge]) -> list[set[int]]:
    """The sets of operations that depend on each other through time."""
    below, above = _forward(edges), _turned(edges)
    found: list[set[int]] = []
    for edge in edges:
        if edge.lag > 0 and not any(edge.giver in cycle and edge.taker in cycle for cycle in found):
            cycle = _reached([edge.taker], below) & _reached([edge.giver], above)
            if edge.giver in cycle and edge.taker in cycle:
                found.append(cycle)
    return found
