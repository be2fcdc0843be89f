"""Implicit steps whose equation is solved inside the step by Newton's method or the like: y_k+1 = y_k - u(F(y_k, x)).

The equation F(y, x) = 0 stands in the graph as a linear combination of the iterate, the old state and fields at them:
F = c (y - x - h theta f(y) - h (1 - theta) f(x)). That the iteration has come to its end shows in the graph too: the
result no longer depends on the iterate that it was made of, which of Newton's method is true at a root alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.normal_form import NormalForm, Stage, normal_form
from stabkit.identification.form.operations import ADDS, PRODUCTS
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.form.slots import Slots
from stabkit.identification.names.single import Name, theta_method
from stabkit.identification.record import Identification, record_of
from stabkit.identification.steps.implicit import SOLVES, right_side
from stabkit.integrators import named
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors

_CONVERGED = 1e-2  # what is left of the iterate in the result: a method that has come to its end to two figures
_CLOSE = 1e-6
_APART = 1e-3  # relative; what is left of 1 - h J in half precision is smaller
_INVERSES = frozenset({"LinalgInv", "LinalgInvEx", "Inverse"})


@dataclass(frozen=True)
class SolvedStep:
    """An implicit step.

    Attributes:
        name: ``"backward_euler"``, ``"trapezoid"``, ``"implicit_midpoint"``, ``"theta method, theta = 0.7"``, or
            ``"linearly implicit Euler (Rosenbrock)"`` where one iteration from the old state is all.
        theta: the weight of the result in the field, or of the field at it; None for other methods.
        h: what multiplies the fields.
        left: what is left of the iterate in the result, relative.
    """

    name: str
    theta: float | None
    h: float
    left: float


def solved_step(piece: Piece, names: Mapping[int, str]) -> SolvedStep | None:
    """The implicit step that a piece of one state solves for; None where no equation is found, or none is solved."""
    source, target = piece.sources[0], piece.targets[0]
    if not any(operation(node) in SOLVES | _INVERSES for node in piece.nodes):
        return None
    if operation(target.node) not in ADDS or meta_of(source).numel != meta_of(target).numel:
        return None
    for iterate in dict.fromkeys(piece.inputs(target.node)):
        found = _linearly_implicit(piece, names) if iterate == source else _solved(piece, iterate, names)
        if found is not None:
            return found
    return None


def _solved(piece: Piece, iterate: Value, names: Mapping[int, str]) -> SolvedStep | None:
    """The equation that the last iteration solves."""
    source, target = piece.sources[0], piece.targets[0]
    if meta_of(iterate).shape != meta_of(source).shape:
        return None
    last = Piece(piece.graph, piece.nodes, [iterate, source], [target])
    if iterate not in last.base or last.nodes == piece.nodes:
        return None
    left = _left(last, iterate, target)
    if left > _CONVERGED:
        return None
    sums = [v for v in (Value(node, 0) for node in last.nodes) if v in last.merges and v != target]
    # sums inside of others are parts of the equation, others beside it are arguments at which its Jacobian is taken
    inside = {node for v in sums for node in last.expand(v)[1] if node is not v.node}
    for whole in reversed([v for v in sums if v.node not in inside and meta_of(v).numel == meta_of(source).numel]):
        equation = Piece(piece.graph, last.nodes, [iterate, source], [whole])
        found = _equation(normal_form(equation, names=names))
        if found is not None:
            return SolvedStep(*found, left)
    return None


def _left(last: Piece, iterate: Value, target: Value) -> float:
    """How much of a cotangent of the result arrives at the iterate, over what would arrive by the iterate itself."""
    w = random_tensors([target], seed=0)[0]
    arrived = pull(last.graph, last.nodes, {node: last.inputs(node) for node in last.nodes}, {target: w}).get(iterate)
    return 0.0 if arrived is None else float(arrived.norm() / w.norm())


def _equation(form: NormalForm) -> tuple[str, float | None, float] | None:
    """Name, theta and h of the method whose equation a value is; None where it is no such equation."""
    iterate, source = form.sources
    terms = form.forms[0]
    own, old = terms.get(iterate), terms.get(source)
    fields = [stage for stage in form.stages if stage.output in terms]
    if own is None or old is None or own.kind != "scalar" or old.kind != "scalar" or not own.value or not fields:
        return None
    if len({stage.key for stage in fields}) > 1:
        return None
    if any(terms[stage.output].kind != "scalar" for stage in fields):
        return None
    weights = {stage: terms[stage.output].value / own.value for stage in fields}
    places = {stage: _place(stage, iterate, source) for stage in fields}
    if any(place is None for place in places.values()):
        return None
    h = abs(sum(weights.values()))
    if h == 0.0:
        return None
    if abs(own.value + old.value) > _CLOSE * abs(own.value):  # a linear part of the field, at the result like the rest
        as_it_is = abs(abs(old.value) - 1) <= _CLOSE and own.value * old.value < 0  # and not, as of 3 x, a multiple
        whole = len(fields) == 1 and places[fields[0]] == 1.0 and as_it_is
        return ("backward_euler", 1.0, h * abs(own.value / old.value)) if whole else None
    if len(fields) == 1:
        place = places[fields[0]]
        return None if not place else (theta_method(place, one_point=True), place, h)
    at_result = sum(w for stage, w in weights.items() if places[stage] == 1.0)
    if any(place not in (0.0, 1.0) for place in places.values()):
        return None
    if len({_factors(stage) for stage in fields}) > 1:
        return None  # one field but for the numbers inside of it: theta may be among them
    theta = abs(at_result) / h
    return theta_method(theta, one_point=False), theta, h


def _place(stage: Stage, iterate: Value, source: Value) -> float | None:
    """Where between the old state (0) and the result (1) a field is taken; None where it is at neither."""
    if len(stage.inputs) != 1 or not stage.inputs[0].keys() <= {iterate, source}:
        return None
    coefficients = stage.inputs[0]
    if any(c.kind != "scalar" for c in coefficients.values()):
        return None
    shares = [coefficients[v].value if v in coefficients else 0.0 for v in (iterate, source)]
    return shares[0] if abs(sum(shares) - 1) <= _CLOSE else None


def _factors(stage: Stage) -> tuple[float, ...]:
    """The numbers that multiply something inside a field."""
    saved = [getattr(n, name, None) for n in stage.nodes for name in ("_saved_other", "_saved_self")
             if operation(n) in PRODUCTS]  # fmt: skip
    return tuple(sorted(float(t) for t in saved if isinstance(t, Tensor) and t.numel() == 1))


def _linearly_implicit(piece: Piece, names: Mapping[int, str]) -> SolvedStep | None:
    """X' = x + (1 - h J)^-1 h f(x), J the Jacobian of the field at x: one iteration from the old state."""
    source = piece.sources[0]
    for node in piece.nodes:
        if operation(node) not in SOLVES or len(set(piece.inputs(node))) != 2:
            continue
        right, matrix = right_side(node), _matrix(node)
        if right is None or matrix is None:
            continue
        before = _between(piece, source, right)
        w = random_tensors([right], seed=0)[0]
        pulled = pull(piece.graph, list(before), before, {right: w}).get(source)
        if pulled is None or pulled.numel() != w.numel():
            continue
        # the right side is h f(x), so (1 - h J)^T w = w - pulled; of either sign, as the equation is written
        expected = (matrix.mT @ _columns(w, matrix)).reshape(-1)
        mine = w.reshape(-1)
        for sign in (1.0, -1.0):
            residual = float((expected - mine + sign * pulled.reshape(-1)).norm() / expected.norm())
            if residual <= _CLOSE and float(pulled.norm()) > _CLOSE * float(w.norm()):
                return SolvedStep("linearly implicit Euler (Rosenbrock)", None, _number(piece, right, names), residual)
    return None


def solves_in_fields(piece: Piece, names: Mapping[int, str]) -> bool:
    """Whether all linear systems of a step are solved inside of its fields, as that of a mass matrix, M(x)^-1 f(x).

    The right side of a method's own system has the old state in it as it is, or the matrix is made of the Jacobian of
    the right side, 1 - h J. A constant matrix may be that of a linear part which the right side has as well.
    """
    solves = [node for node in piece.nodes if operation(node) in SOLVES]
    return bool(solves) and all(_is_in_field(piece, node, names) for node in solves)


def _is_in_field(piece: Piece, node: Node, names: Mapping[int, str]) -> bool:
    right, matrix = right_side(node), _matrix(node)
    if right is None or matrix is None or right in piece.ends or right.node not in piece.inside:
        return False
    form = normal_form(Piece(piece.graph, piece.nodes, piece.sources, [right], contexts=piece.contexts), names=names)
    terms = form.forms[0]
    if any(atom in form.sources for atom in terms):
        return False
    added = [stage for stage in form.stages if stage.output in terms]
    if any(operation(n) in SOLVES for stage in added for n in stage.nodes):
        return False  # a solution on the right side of the next system, as of Newton's method that has not ended
    if len(set(piece.inputs(node))) < 2:
        return not any(stage.is_affine for stage in added)
    (w,) = random_tensors([right], seed=0)
    expected = (matrix.mT @ _columns(w, matrix)).reshape(-1)
    span = [w.reshape(-1)]
    for source in piece.sources:
        before = _between(piece, source, right)
        pulled = pull(piece.graph, list(before), before, {right: w}).get(source)
        if pulled is not None and pulled.numel() == w.numel():
            span.append(pulled.reshape(-1))
    columns = torch.stack(span, 1)
    left = expected - columns @ torch.linalg.lstsq(columns, expected[:, None]).solution[:, 0]
    return float(left.norm()) > _APART * float(expected.norm())


def _between(piece: Piece, source: Value, target: Value) -> dict[Node, list[Value]]:
    """The nodes between two values of a piece, with their inputs."""
    part = Piece(piece.graph, piece.nodes, [source], [target])
    return {node: part.inputs(node) for node in part.nodes}


def _matrix(node: Node) -> Tensor | None:
    saved = getattr(node, "_saved_A", None)
    return saved.detach() if isinstance(saved, Tensor) else None


def _columns(w: Tensor, matrix: Tensor) -> Tensor:
    return w if w.dim() == matrix.dim() else w.unsqueeze(-1)


def _number(piece: Piece, value: Value, names: Mapping[int, str]) -> float:
    """The number that multiplies the one field of a value."""
    form = normal_form(Piece(piece.graph, piece.nodes, piece.sources[:1], [value]), names=names)
    numbers = [c.value for atom, c in form.forms[0].items() if atom not in form.piece.ends and c.kind == "scalar"]
    return abs(numbers[0]) if len(numbers) == 1 and numbers[0] else 1.0


def held_iteration(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification | None:
    """The record of one round of z' = y + h f(z), y being what the iteration began with; None for others.

    Where it settles, z = y + h f(z) is a step of backward Euler from y: so i-ResNets are inverted (Behrmann et al.
    2019), and implicit layers unrolled whose rounds are steps of the flow.
    """
    terms, stage = _round_of(around, found, steps)
    near = [i for i in (steps[0] - 1, steps[-1] + 1) if 0 <= i < len(around.flow.steps)]
    if stage is None or not any(_repeats(around, stage, i) for i in near):
        return None
    held = [v for v in terms if v in found.contexts]
    begun = any(state.values == (v,) for state in around.flow.states[: steps[0]] for v in held)
    if not begun or terms[held[0]].value != 1.0:
        return None
    h = next(c.value for v, c in terms.items() if v not in found.contexts)
    why = "one round of a fixed-point iteration: what it began with is held fixed, and one field is used in every round"
    field = f"{'-' if h < 0 else '+'} {'' if abs(h) == 1 else f'{abs(h):.3g} '}f(z)"
    system = f"z = y {field}, a backward Euler step from y, where it settles"
    name = Name("plain (fixed-point iteration)", system, 1.0, "h = 1: the map itself")
    return record_of(name, None, steps, skip=0.0, residual=0.0, notes=(why,))


def _round_of(
    around: Surroundings, found: Slots, steps: tuple[int, ...]
) -> tuple[Mapping[Value, Coefficient], Stage | None]:
    """The terms of a step that adds one field of the state alone to one value that is held fixed, and the field."""
    form = around.normal_form(steps[0], steps[-1] + 1, found)
    terms = form.forms[0]
    stages = [stage for stage in form.stages if stage.output in terms]
    held = [v for v in terms if v in found.contexts]
    alone = len(form.stages) == len(stages) == len(held) == 1 and len(terms) == 2
    if not alone or any(c.kind != "scalar" for c in terms.values()) or len(stages[0].inputs) != 1:
        return {}, None
    read = set(stages[0].inputs[0])
    return (terms, stages[0]) if read == set(found.sources) else ({}, None)


def _repeats(around: Surroundings, stage: Stage, index: int) -> bool:
    """Whether another step uses a field again."""
    found = around.slots(index, index + 1)
    if len(found.sources) != 1 or len(found.targets) != 1:
        return False
    return any(other.key == stage.key for other in around.normal_form(index, index + 1, found).stages)


def record_of_equation(solved: SolvedStep, steps: tuple[int, ...]) -> Identification:
    """The record of an implicit step whose equation is solved by iteration."""
    known = {"backward_euler", "trapezoid", "implicit_midpoint"}
    declared = "h: the number that multiplies the field" if solved.h != 1 else "h = 1: only h f can be seen"
    why = f"the equation is solved inside the step: {solved.left:.2g} of the last iterate is left in the result"
    if solved.name.startswith("linearly"):
        why = "one linear system, 1 - h J with the Jacobian of the field at the old state, and its solution is added"
    return Identification(
        name=solved.name,
        method=named(solved.name) if solved.name in known else None,
        skip=None,
        step_size=solved.h,
        convention=declared,
        evidence="measured",
        residual=solved.left,
        steps=steps,
        notes=(why,),
        system="x' = f(x)",
    )
