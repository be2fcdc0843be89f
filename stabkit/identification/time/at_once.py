"""Linear recurrences over time that are computed for all times at once: by doubling, running sums, or in one product.

A scan h_t = a_t h_{t-1} + u_t need not be a loop: associative scans (Hillis and Steele 1986; Blelloch 1990), running
sums of u over running products of a, the same in logarithms (Heinsen 2023) and masks of decays (Dao and Gu 2024) leave
no chain of states. What tells it is the operator L from u to h, and no order of operations: it is a recurrence where

    L_tt = 1   and   L_ts = a_t L_{t-1,s}   for all s < t.

Then a cotangent c of h_t, pulled back to u, is at t - 1 what the step passes on, a_t^T c; and that, given to h_{t-1},
arrives at all earlier times as c itself did. This is tested at two times on random cotangents. What is between must be
linear in u, other factors held fixed; or the logarithm of sums of exponentials, where h is the exponential of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, JOINS, MOVES, PRODUCTS, is_affine, is_opaque
from stabkit.identification.record import Recurrence
from stabkit.identification.steps.linear_recurrence import Coupling, coupling
from stabkit.identification.steps.step_rules import Made
from stabkit.identification.time.over_time import linear_recurrence
from stabkit.tracing import Flow
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.scans import FEWEST
from stabkit.tracing.graph.values import Meta, Value, meta_of, operation, outputs_of, random_of, random_tensors
from stabkit.tracing.products.node_derivatives import apply_node, is_python_node
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.recording.sharding import whole

_CLOSED = frozenset({"Cumprod", "Cumsum", "FftC2C", "FftR2C", "Logcumsumexp"})
_SHIFTS = JOINS | {"ConstantPadNd", "CopySlices", "IndexPut", "Roll", "Slice", "SliceScatter"}
_ROUNDINGS = 100.0  # multiple of the rounding unit by which a Fourier transform may miss a zero
_SLACK = 1e4  # the same for the operator: logarithms of decays are summed over all times, and then taken apart
_FEWEST = 4  # times: the property is measured for all of them, and three earlier ones are the least that say something
_FEWEST_SHIFTS = 4
_MOST = 24  # pairs of values that are tried in a step
_NOTE = "computed for all times at once: its operator is that of a recurrence"


def recurrences_at_once(flow: Flow, start: int, stop: int) -> tuple[Recurrence, ...]:
    """The linear recurrences between two states of a flow that are no chain of states.

    Args:
        flow: a traced forward pass.
        start: index of the state before.
        stop: index of the state after.
    """
    stretch = _Stretch(flow, start, stop)
    if not stretch.may_hold or any(step.segment.recomputes for step in flow.steps[start:stop]):
        return ()
    found: list[_Operator] = []
    tried = 0
    for pair in stretch.pairs():
        if any(pair.new.node in known.inside for known in found):
            continue
        if tried == _MOST:
            break
        tried += 1
        operator = _Operator(flow, pair)
        if operator.is_recurrence and stretch.runs_along(pair):
            found.append(operator)
    return tuple(stretch.read(operator) for operator in reversed(found))


def closed_form_note(flow: Flow, start: int, stop: int) -> str:
    """A note where steps may hold a recurrence in closed form, which has no states to be read; empty elsewhere.

    Those are steps with a cumulative operation or a Fourier transform in which a time takes nothing of later ones: a
    cotangent in the middle of an axis arrives before it, and not behind it.
    """
    before, after = flow.states[start], flow.states[stop]
    names = {name for step in flow.steps[start:stop] for name in step.operations} & _CLOSED
    if not names or len(before.values) != 1 or len(after.values) != 1:
        return ""
    meta, axis_of_samples = meta_of(after.values[0]), after.layouts[0].axis
    if meta_of(before.values[0]).shape != meta.shape:
        return ""
    (drawn,) = random_tensors(after.values, seed=0)
    for axis, size in enumerate(meta.shape):
        if size < FEWEST or axis == axis_of_samples:
            continue
        middle = size // 2
        given = torch.zeros_like(drawn)
        given.select(axis, middle).copy_(drawn.select(axis, middle))
        cotangents = [given]
        for step in reversed(flow.steps[start:stop]):
            cotangents = step.vjp(cotangents)
        earlier, later = (cotangents[0].narrow(axis, *span) for span in ((0, middle), (middle + 1, size - middle - 1)))
        rounding = _ROUNDINGS * torch.finfo(meta.dtype).eps * float(cotangents[0].norm())
        if float(later.norm()) <= rounding < float(earlier.norm()):
            return (
                f"axis {axis} is passed causally, with {', '.join(sorted(names))}: if that is a recurrence in closed "
                "form, it has no chain of states and is not read over time"
            )
    return ""


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two values of one shape that may be what drives a recurrence, and its states at all times.

    Attributes:
        drive: what drives it, u.
        new: the states, h.
        outer: the axis of the state at the end along which time runs.
        axis: that of the two values.
        time: a time in the middle, to which all earlier ones lead.
        of_logarithms: whether h is the exponential of a sum of exponentials' logarithm.
        inside: the operations between that depend on u, with how many of their inputs do.
    """

    drive: Value
    new: Value
    outer: int
    axis: int
    time: int
    of_logarithms: bool
    inside: dict[Node, int]


class _Stretch:
    """The operations between two states of a flow, as far as they pass on times."""

    def __init__(self, flow: Flow, start: int, stop: int) -> None:
        self._flow, self._graph, self._after = flow, flow.recorded.graph, flow.states[stop]
        self._nodes = self._graph.nodes[flow.states[start].position : self._after.position]

    @property
    def may_hold(self) -> bool:
        """Whether anything brings times to each other that needs no loop: sums, a custom operation, many shifts.

        Shifts are counted along paths that are linear in one value at least. Doubling takes two operations a round, so
        that four are two rounds; rotations of queries (two) and tokens that are shifted once end in another operation.
        """
        shifts: dict[Node, int] = {}
        for node in self._nodes:
            name, inputs = operation(node), self._graph.inputs[node]
            if name in _CLOSED or _is_own(node):
                return True
            linear = name in PRODUCTS or is_affine(node, 1)
            before = max((shifts.get(v.node, 0) for v in inputs), default=0) if linear else 0
            shifts[node] = before + (name in _SHIFTS)
        return max(shifts.values(), default=0) >= _FEWEST_SHIFTS

    def pairs(self) -> Iterator[_Pair]:
        """The pairs that may be a drive and its states: the last states first, the widest stretch before others."""
        rank = self._graph.rank
        for outer, spans in self._reached():
            starts = {v: {a: s[1] for a, s in enumerate(along) if _is_start(s)} for v, along in spans.items()}
            drives = sorted((v for v, axes in starts.items() if axes), key=lambda v: rank.get(v.node, -1))
            found: list[_Pair] = []
            for drive in drives:
                followers = _Followers(self._graph, self._nodes, drive)
                for value in followers.states:
                    if value not in spans or meta_of(value).shape != meta_of(drive).shape:
                        continue
                    logs = value in followers.of_logarithms
                    found += [
                        _Pair(drive, value, outer, axis, time, logs, followers.inside)
                        for axis, time in starts[drive].items()
                        if spans[value][axis] == (time, time, 1)
                    ]
            # the widest: what is divided by running products before a sum is multiplied by them behind it
            found.sort(key=lambda p: (-rank[p.new.node], (-1) ** p.of_logarithms * rank.get(p.drive.node, -1)))
            yield from found

    def _reached(self) -> Iterator[tuple[int, dict[Value, list[tuple[int, int, int]]]]]:
        """Where along each axis of every value a cotangent arrives that is at one index of an axis at the end."""
        shape, layout = meta_of(self._after.values[0]).shape, self._after.layouts[0].axis
        axes = [a for a, size in enumerate(shape) if size >= _FEWEST and a != layout]
        for axis in axes if len(self._after.values) == 1 else ():
            arriving = self._arriving(self._at(axis, shape[axis] // 2))
            yield axis, {value: [_span(cotangent, a) for a in range(cotangent.dim())] for value, cotangent in arriving}

    def _at(self, axis: int, index: int) -> dict[Value, Tensor]:
        """A cotangent of the state at the end that is at one index of an axis alone."""
        (drawn,) = random_tensors(self._after.values, seed=0)
        given = torch.zeros_like(drawn)
        given.select(axis, index).copy_(drawn.select(axis, index))
        return {self._after.values[0]: given}

    def runs_along(self, pair: _Pair) -> bool:
        """Whether the times of a pair are those of the axis at the end, from the first to the last or back.

        Sums over the bins of a spline have an order that is none of positions.
        """
        last = meta_of(self._after.values[0]).shape[pair.outer] - 1
        known = []
        for index in (0, last):
            for value, cotangent in self._arriving(self._at(pair.outer, index)):
                if value == pair.new:
                    known.append((index > 0, *_span(cotangent, pair.axis)))
                    break
        latest = meta_of(pair.new).shape[pair.axis] - 1
        ahead = [high - low == 0 and (low >= latest - 1 if at_end else low <= 1) for at_end, low, high, _ in known]
        back = [high - low == 0 and (low <= 1 if at_end else low >= latest - 1) for at_end, low, high, _ in known]
        return bool(known) and (all(ahead) or all(back))

    def _arriving(self, given: dict[Value, Tensor]) -> Iterator[tuple[Value, Tensor]]:
        """What arrives of some cotangents at every value before, each once it is complete."""
        grads = dict(given)
        with torch.no_grad():
            for node in reversed(self._nodes):
                arrived = [grads.pop(value, None) for value in outputs_of(node)]
                if all(a is None for a in arrived):
                    continue
                yield from ((v, a) for v, a in zip(outputs_of(node), arrived, strict=True) if a is not None)
                for value, grad in apply_node(node, arrived, self._graph.inputs[node]):
                    grads[value] = grads[value] + grad if value in grads else grad
        yield from grads.items()

    def read(self, operator: _Operator) -> Recurrence:
        """The reading of a recurrence."""
        pair, inputs = operator.pair, self._graph.inputs
        path = self._flow.recorded.path_of(pair.new.node)
        added = MOVES if pair.of_logarithms else MOVES | ADDS  # to add logarithms is to multiply
        fed = any(len(inputs[n]) > active and operation(n) not in added for n, active in operator.inside.items())
        coupled = operator.coupled
        n_steps = meta_of(pair.new).shape[pair.axis]
        if coupled is None:
            return Recurrence(
                "linear recurrence (coupled)", "x' = A(u) x + B u", "measured", None, path, n_steps, fed=fed,
                growth=operator.growth,
                notes=(_NOTE, "more than one axis of the state is coupled: its matrix was not taken apart"),
            )  # fmt: skip
        made = Made(convex=coupled.size == 1 and self._is_convex(operator, coupled))
        record = linear_recurrence(
            coupled, made, path, n_steps, time=pair.time, fed=fed, growth=operator.growth, notes=(_NOTE,)
        )
        return replace(record, evidence="measured", residual=max(operator.residual, coupled.residual))

    def _is_convex(self, operator: _Operator, coupled: Coupling) -> bool:
        """Whether some value enters with the weight 1 - a; where entries choose between two makers, either may."""
        pair = operator.pair
        weight = 1 - coupled.blocks[..., 0, 0]
        given = torch.zeros(meta_of(pair.new).shape, dtype=meta_of(pair.new).dtype, device=meta_of(pair.new).device)
        given.select(pair.axis, pair.time).fill_(1.0)
        for value, cotangent in self._arriving({pair.new: given}):
            if cotangent.shape == given.shape and value != pair.new:
                own = cotangent.select(pair.axis, pair.time).cpu().conj()
                taken = own != 0
                if taken.double().mean() >= 0.25 and torch.allclose(own[taken], weight[taken], rtol=operator.slack):
                    return True
        return False


class _Followers:
    """What is made of a value by operations that are linear in it, or sum its exponentials and take the logarithm.

    Attributes:
        inside: the operations, with how many of their inputs depend on it.
        states: the values that may be states: linear in the value and raised to no power, or exponentials.
        of_logarithms: those that are exponentials.
    """

    def __init__(self, graph: Graph, nodes: Sequence[Node], drive: Value) -> None:
        inputs = graph.inputs
        kinds: dict[Value, str] = {drive: "linear"}
        self.inside: dict[Node, int] = {}
        raised: set[Value] = set()
        for node in nodes:
            made_of = [v for v in inputs[node] if v in kinds]
            if not made_of:
                continue
            kind = _kind(node, [kinds[v] for v in made_of])
            if operation(node) in ("Exp", "Exp2", "Logcumsumexp"):
                raised.update(v for v in made_of if kinds[v] == "linear")
            self.inside[node] = len(made_of)
            kinds.update((v, kind) for v in outputs_of(node))
        for node in reversed(nodes):  # what is summed up to become an exponent is no state
            if node in self.inside and not raised.isdisjoint(outputs_of(node)):
                raised.update(v for v in inputs[node] if v in kinds)
        self.of_logarithms = {v for v, kind in kinds.items() if kind == "exponential"}
        self.states = [v for v, kind in kinds.items() if kind in ("linear", "exponential") and v not in raised]


def _kind(node: Node, kinds: Sequence[str]) -> str:
    """What an operation makes of values that are linear in another one, logarithms of sums of it, or neither."""
    name, (first, *others) = operation(node), kinds
    if any(kind != first for kind in others) or first in ("", "exponential"):
        return ""
    if first == "linear":
        own = _is_own(node) and not others  # linear or not: the operator is tested at this input
        return "linear" if own or is_affine(node, len(kinds)) else "logarithm" if name == "Logcumsumexp" else ""
    if name in ("Exp", "Exp2"):
        return "exponential"
    return "logarithm" if name in MOVES | ADDS else ""


class _Operator:
    """The operator from what drives a recurrence to its states at all times."""

    def __init__(self, flow: Flow, pair: _Pair) -> None:
        self.pair = pair
        rank = flow.recorded.graph.rank
        first, last = rank.get(pair.drive.node, -1) + 1, rank[pair.new.node] + 1
        parameters = list(flow.model.parameters())
        self._segment: Segment = flow.recorded.segment((pair.drive,), (pair.new,), first, last, parameters)
        self.inside = _leading(flow.recorded.graph, pair)
        shape, dtype, device = meta_of(pair.new)
        self._meta = Meta(tuple(s for a, s in enumerate(shape) if a != pair.axis), dtype, device)
        self._times = shape[pair.axis]
        self.slack = _SLACK * torch.finfo(dtype).eps
        self.residual = 0.0

    @property
    def source_metas(self) -> list[Meta]:
        """Of the state at one time."""
        return [self._meta]

    target_metas = source_metas

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """A cotangent of the state in the middle, pulled back over one time step."""
        return [self._pulled(cotangents[0], self.pair.time)[self.pair.time - 1]]

    def _pulled(self, cotangent: Tensor, time: int) -> Tensor:
        """What a cotangent of the state at one time becomes at the drive, time first."""
        given = torch.zeros(meta_of(self.pair.new).shape, dtype=self._meta.dtype, device=self._meta.device)
        given.select(self.pair.axis, time).copy_(cotangent)
        return self._segment.vjp([given])[0].movedim(self.pair.axis, 0)

    @cached_property
    def is_recurrence(self) -> bool:
        """Whether it is the operator of h_t = a_t h_{t-1} + u_t, as far as two random cotangents tell."""
        tested = self._scaled_alike if self.pair.of_logarithms else self._is_chained
        return all(map(tested, sorted({self.pair.time, self._times - 1})))

    def _is_chained(self, time: int) -> bool:
        (drawn,) = random_of([self._meta], seed=time)
        row = self._pulled(drawn, time)
        if row[time + 1 :].any() or not self._alike(row[time], drawn):
            return False
        before = self._pulled(row[time - 1], time - 1)
        return self._alike(before[: time - 1], row[: time - 1])

    def _scaled_alike(self, time: int) -> bool:
        row, before = self._rows(time)
        factor = row[time - 1] / before[time - 1]
        return not row[time + 1 :].any() and self._alike(factor * before[: time - 1], row[: time - 1])

    def _rows(self, time: int) -> tuple[Tensor, Tensor]:
        one = torch.ones(self._meta.shape, dtype=self._meta.dtype, device=self._meta.device)
        return self._pulled(one, time), self._pulled(one, time - 1)

    def _alike(self, a: Tensor, b: Tensor) -> bool:
        size = float(b.norm())
        off = float((a - b).norm()) / size if 0 < size < math.inf else math.inf
        self.residual = max(self.residual, off)
        return off <= self.slack

    @cached_property
    def coupled(self) -> Coupling | None:
        """How the state at the time in the middle depends on that before."""
        if not self.pair.of_logarithms:
            return coupling(self)
        row, before = self._rows(self.pair.time)
        factor = (row / before)[self.pair.time - 1].cpu()
        return Coupling(factor[..., None, None], self.residual, "diagonal")

    @cached_property
    def growth(self) -> float:
        """What a random cotangent of the last state gains a time step on its way to the first, nats."""
        (drawn,) = random_of([self._meta], seed=0)
        row = self._pulled(drawn, self._times - 1)
        last = float((row[-1]).norm())
        gained = float(row[0].norm()) / last if last else 0.0
        return math.log(gained) / (self._times - 1) if gained > 0 else -math.inf


def _leading(graph: Graph, pair: _Pair) -> dict[Node, int]:
    """The operations that lead from the drive of a pair to its states, with how many inputs of each depend on it."""
    stack, found = [pair.new.node], dict[Node, int]()
    while stack:
        node = stack.pop()
        if node in pair.inside and node not in found and node is not pair.drive.node:
            found[node] = pair.inside[node]
            stack.extend(value.node for value in graph.inputs[node])
    return found


def _is_own(node: Node) -> bool:
    """Whether an operation has a backward that somebody wrote, and is none of those that are known."""
    return is_python_node(node) and is_opaque(node)


def _span(cotangent: Tensor, axis: int) -> tuple[int, int, int]:
    """The first index along an axis that is reached, the last, and how many are."""
    rows = whole(cotangent).detach().movedim(axis, 0).unsqueeze(-1).flatten(1)  # also of no entries
    reached = (rows != 0).any(dim=1).nonzero().flatten().tolist()
    return (reached[0], reached[-1], len(reached)) if reached else (-1, -1, 0)


def _is_start(span: tuple[int, int, int]) -> bool:
    """Whether a time and all before it are reached, three at least."""
    first, last, count = span
    return first == 0 and count == last + 1 >= _FEWEST - 1
