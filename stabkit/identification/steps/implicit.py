"""Layers that solve for their result: a linear system, or a fixed point z = f(z, x).

Fixed points are found by the calls they make, and confirmed by running them again.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.identification.fields.shared import key_of
from stabkit.identification.form.gates import is_quotient_of_inner_products
from stabkit.identification.form.operations import MOVES, has_matrix
from stabkit.identification.form.pieces import Piece
from stabkit.identification.names.single import Name
from stabkit.identification.record import Identification, nothing, record_of
from stabkit.integrators import named
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import Value, operation, outputs_of
from stabkit.tracing.recording.hooks import hooked

SOLVES = frozenset(
    {"CholeskySolve", "LinalgLuSolve", "LinalgSolve", "LinalgSolveEx", "LinalgSolveTriangular", "TriangularSolve"}
)
_FIRST = frozenset({"CholeskySolve", "TriangularSolve"})  # those that take the right side first, and then the matrix
_FEWEST = 3
_CONVERGED = 1e-2  # relative change at the last call: settled to two figures
_MIXED = 1e-3  # relative; of what plain or damped iterations go on with, roundings of half precision are about this far
_AVERAGED = 12  # changes, since complex eigenvalues make their ratios swing


@dataclass(frozen=True)
class FixedPoint:
    """A fixed-point iteration inside a forward pass.

    Attributes:
        module_path: the module that is called again and again.
        iterations: how often.
        residual: ``||z - f(z, x)|| / ||z||`` at the last call: that of the module where it is f, else the relative
            change of its input.
        contraction: mean ratio of the last changes, about the spectral radius of df/dz where each call goes on from
            the one before; None when they are rounding.
        plain: whether each call begins at what the one before gave out, or at a fixed share of the way there; None
            where the module is only a part of f, so that this cannot be told.
    """

    module_path: str
    iterations: int
    residual: float
    contraction: float | None
    plain: bool | None = None

    def __str__(self) -> str:
        """Who is called how often, and what that does to the distance from the solution."""
        called = f"{self.module_path} is called {self.iterations} times"
        if self.contraction is None:
            return called
        if self.plain:
            return f"{called}, contracting by {self.contraction:.3g} a call"
        if self.plain is None:
            return f"{called}, the change of its input shrinks by {self.contraction:.3g} a call"
        return (f"{called} by an accelerated iteration (what a call begins at is a mixture of earlier ones), and "
                f"|f(z) - z| shrinks by {self.contraction:.3g} a call, which is no property of f")  # fmt: skip


@dataclass(frozen=True)
class LinearSolve:
    """Linear systems that are solved inside a step.

    Attributes:
        count: how many, one after the other.
        of_the_state: whether each is M x' = x with a constant M, and nothing else.
    """

    count: int
    of_the_state: bool


def record_of_solve(solved: LinearSolve, steps: tuple[int, ...]) -> Identification:
    """The record of a step that solves a linear system for its result."""
    if not solved.of_the_state:
        why = "a linear system is solved on the way to the result; what method that makes was not found"
        return nothing(steps, "semi-implicit (linear solve)", why, "unknown")
    many = f"{solved.count} steps of " if solved.count > 1 else ""
    system = "x' = f(x), f = (1 - M) x, M the matrix that is solved"
    name = Name(f"{many}backward_euler", system, 1.0, "h = 1: M = 1 - h J")
    record = record_of(name, None, steps, skip=None, residual=0.0)
    return replace(record, method=None if many else named("backward_euler"))


def right_side(node: Node) -> Value | None:
    """The right side of a linear system; None where it is a constant."""
    parent, output = node.next_functions[0 if operation(node) in _FIRST else 1]
    return None if parent is None else Value(parent, output)


def linear_solve(piece: Piece) -> LinearSolve | None:
    """The linear systems that a step of one state solves; None without one."""
    nodes = [node for node in piece.nodes if operation(node) in SOLVES]
    if not nodes or _inside_fields(piece):
        return None
    moves_else = all(operation(node) in MOVES | SOLVES for node in piece.nodes)
    return LinearSolve(len(nodes), moves_else and all(len(piece.inputs(node)) == 1 for node in nodes))


def _inside_fields(piece: Piece) -> bool:
    """Whether a skip leads around all systems, and no solution is added to it but by a matrix of its own.

    Of x + S^-1 f(x) it may be that S = 1 - h J; what x + W S^-1 f(x) solves for is a value inside a field, as chunks of
    the delta rule do.
    """
    stack, seen = list(piece.targets), set[Value]()
    while stack:
        value = stack.pop()
        if value in seen or value in piece.ends:
            continue
        seen.add(value)
        if operation(value.node) in SOLVES:
            return False
        if not has_matrix(value.node):
            stack.extend(piece.inputs(value.node))
    return all(target in piece.carrying for target in piece.targets)


def inner_iterations(piece: Piece, names: Mapping[int, str]) -> int:
    """How many rounds of conjugate gradients or the like a step runs: quotients of inner products with one operator.

    What makes an iteration of them is that the operator is applied again to what the quotient before has moved. One
    line search is a step, and projections of several branches on each other have quotients and no operator.
    """
    if len(piece.sources) != 1 or not any(operation(node) == "Div" for node in piece.nodes):
        return 0
    made: set[Value] = set(piece.sources)
    behind: set[Value] = set()  # what some quotient has a part in
    quotients: list[Node] = []
    between: set[Node] = set()
    for node in piece.nodes:
        inputs = piece.inputs(node)
        outputs = outputs_of(node)
        if any(v in made for v in inputs):
            made.update(outputs)
        if _is_operator(node) and any(v in behind for v in inputs):
            between.add(node)
        if is_quotient_of_inner_products(Value(node, 0), piece.inputs, made, piece.ends):
            quotients.append(node)
        if node in quotients or any(v in behind for v in inputs):
            behind.update(outputs)
    before = _leading_to(piece, quotients)
    rounds = Counter(key_of([node], names) for node in piece.nodes if node in before and _is_operator(node))
    again = {key_of([node], names) for node in between & before}
    return max((rounds[key] for key in again), default=min(len(quotients), 1))


def _is_operator(node: Node) -> bool:
    """Whether a node may be the operator of a linear system, or a part of it: a matrix, a kernel, a transform."""
    return has_matrix(node) or operation(node).startswith("Fft")


def _leading_to(piece: Piece, ends: Sequence[Node]) -> set[Node]:
    """The nodes that some others are made of."""
    stack, found = list(ends), set[Node]()
    while stack:
        node = stack.pop()
        if node not in found and node in piece.inside:
            found.add(node)
            stack.extend(v.node for v in piece.inputs(node) if v not in piece.ends)
    return found


def solves_inside(flow: Flow, start: int, stop: int) -> bool:
    """Whether some steps take up values that were computed off the graph by calling modules again and again."""
    first, last = _clock(flow, start, stop)
    if not any(first <= s.time < last for s in flow.recorded.recording.stopped):
        return False
    return any(count >= _FEWEST for count in _silent_calls(flow, first, last).values())


def silent_rounds(flow: Flow, start: int, stop: int) -> str:
    """What is called off the graph inside some steps that no fixed point was found of: which modules, how often."""
    first, last = _clock(flow, start, stop)
    often = {path: count for path, count in _silent_calls(flow, first, last).items() if count >= _FEWEST}
    outer = [path for path in often if path and not any(path.startswith(f"{other}.") for other in often if other)]
    heard = {call.path for call in flow.recorded.recording.calls if call.start < call.stop}
    told = ", ".join(f"{path} {often[path]} times" for path in outer)
    same = " and, with the same weights, on it" if any(path in heard for path in outer) else ""
    calls = f" ({told}{same})" if told else ""
    return (f"modules are called again and again off the graph{calls}, and no fixed point was found in them: these "
            "rounds have no gradient, and are no steps of this flow")  # fmt: skip


def iterates_silently(flow: Flow, start: int, stop: int) -> bool:
    """Whether a module that steps call on the graph was called again and again off it: by a solver with buffers."""
    first, last = _clock(flow, start, stop)
    heard = {call.path for call in flow.recorded.recording.begun(first, last) if call.start < call.stop}
    return any(count >= _FEWEST and path in heard for path, count in _silent_calls(flow, first, last).items())


def begins_at_constants(flow: Flow, start: int, stop: int) -> bool:
    """Whether steps evaluate a module at a constant, and then at what depends on the source: at the state of a solver.

    What the solver began with is no part of the graph then, and the source of the steps is an input of the field.
    """
    first, last = _clock(flow, start, stop)
    silent: set[str] = set()
    for call in flow.recorded.recording.begun(first, last):
        if next(call.module.parameters(), None) is not None:
            if call.start < call.stop and call.path in silent:
                return True
            if call.start == call.stop:
                silent.add(call.path)
    return False


def _clock(flow: Flow, start: int, stop: int) -> tuple[int, int]:
    clocks = [*flow.recorded.graph.clock, flow.recorded.recording.stop]
    return clocks[flow.states[start].position], clocks[flow.states[stop].position]


def _silent_calls(flow: Flow, first: int, last: int) -> Counter[str]:
    return Counter(call.path for call in flow.recorded.recording.begun(first, last) if call.start == call.stop)


def fixed_point(flow: Flow) -> FixedPoint | None:
    """The fixed-point iteration of a traced model, measured by running the model once more on the recorded input.

    Returns:
        The iteration that moves least at its end; None when the model has none, or cannot be called with the
        recorded input alone.
    """
    if flow.side_inputs or not _takes_the_source(flow):
        return None
    seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def watch(path: str) -> object:
        def note(_module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor):
                made = output.detach().clone() if isinstance(output, Tensor) else None
                seen.setdefault(path, []).append((args[0].detach().clone(), made))

        return note

    with flow.forward_pass.kept(), torch.no_grad():
        handles = [m.register_forward_hook(watch(path)) for path, m in flow.model.named_modules()]
        with hooked(handles):
            flow.model(flow.states[0].tensors[0])
    found = [f for path, calls in seen.items() if (f := _measured(path, calls)) is not None]
    whole = [f for f in found if f.plain is not None]  # the module of f itself, rather than one inside
    return min(whole or found, key=lambda f: f.residual, default=None)


def _takes_the_source(flow: Flow) -> bool:
    parameters = [
        p
        for p in inspect.signature(flow.model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = {"0", "input", *(p.name for p in parameters)}
    return len(parameters) == 1 and flow.source_name in names


def _measured(path: str, calls: list[tuple[Tensor, Tensor | None]]) -> FixedPoint | None:
    """The iteration behind a module's calls: None unless they settle."""
    inputs = [x for x, _ in calls]
    if len(inputs) <= _FEWEST or any(x.shape != inputs[0].shape for x in inputs):
        return None
    if not inputs[0].is_floating_point():
        return None  # an embedding that is looked up again and again
    size = float(inputs[-1].double().norm())
    rounding = 100 * torch.finfo(inputs[0].dtype).eps * size
    itself = _as_f([(x, y) for x, y in calls if y is not None and y.shape == x.shape], len(calls))
    changes = [float((b - a).double().norm()) for a, b in itertools.pairwise(inputs)]
    if itself is not None:
        changes = itself[0]
    elif changes[-1] == 0.0 and len(changes) > 1 and changes[-2] > rounding:
        changes.pop()  # a last call at the point of the one before tells nothing of how far that is from f
    if size == 0.0 or max(changes) == 0.0 or changes[-1] > 0.1 * max(changes):
        return None
    clear = list(itertools.takewhile(lambda change: change > rounding, changes))[-_AVERAGED - 1 :]
    if changes[-1] > _CONVERGED * size:
        return None  # calls that come closer to each other, and then end, are some rounds of a map
    contraction = math.exp(math.log(clear[-1] / clear[0]) / (len(clear) - 1)) if len(clear) > 1 else None
    return FixedPoint(path, len(inputs), changes[-1] / size, contraction, None if itself is None else itself[1])


def _as_f(calls: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[list[float], bool] | None:
    """``||f(z) - z||`` at every call of a module that is f, and whether calls go on from each other; None for others.

    A call at the point of the one before, such as the one that puts the result on the graph, is left out.
    """
    if len(calls) < count:
        return None
    kept = [calls[0], *(b for a, b in itertools.pairwise(calls) if not torch.equal(a[0], b[0]))]
    away = [y.double() - x.double() for x, y in kept]
    sizes = [float(r.norm()) for r in away]
    if len(kept) <= 1 or not max(sizes) or sizes[-1] > _CONVERGED * float(kept[-1][0].double().norm()):
        return None
    moves = [b[0].double() - a[0].double() for a, b in itertools.pairwise(kept)]
    shares = [
        float((m * r).sum() / (r * r).sum()) if float(r.norm()) else 1.0 for m, r in zip(moves, away, strict=False)
    ]
    plain = all(float((m - shares[0] * r).norm()) <= _MIXED * float(m.norm()) + _MIXED * sizes[-1]
                for m, r in zip(moves, away, strict=False))  # fmt: skip
    return sizes, plain
