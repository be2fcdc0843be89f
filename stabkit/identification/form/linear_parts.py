"""Linear operators on the way of a state: x' = P x + S b(x), with P and S matrices that hold for every input.

Where S is a number and P is one, this is a skip and a branch. Otherwise P and S tell the method, without the matrices
of the code at hand. With M = (1 + h theta A)^-1 on all of an explicit sum,

    x' = M (x - h (1 - theta) A x + h f(x)):   S = h M,  P = (1 + r) M - r,  r = (1 - theta) / theta,

so P is an affine function of S, and its two coefficients are theta and h: theta = 1 is a semi-implicit step, 1/2 the
rule of Crank and Nicolson. The exponential Euler step has P = exp(h L), S = h phi_1(h L) = (P - 1) L^-1, which commute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDENDS, ADDS, JOINS, MOVES, SCALES, WRITES, is_affine
from stabkit.identification.form.pieces import ADDED, Piece, pull
from stabkit.identification.steps.implicit import SOLVES, right_side
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, random_tensors
from stabkit.tracing.products.step_products import Space

Matrix = npt.NDArray[np.complex128]
LINEAR_SKIP = "linear skip"
BACKWARD_EULER = "backward Euler"
TRANSFORMS = frozenset({"FftC2C", "FftC2R", "FftR2C", "ViewAsReal", "ViewAsComplex"})
_ROUNDINGS = 2048.0  # products with a few matrices, and solutions of linear systems, that are not badly conditioned
_SEEN = 1e-3  # part of an operator by which two may differ in a basis that blurs them, and still be told apart
_LARGEST_DENSE = 128  # a sample: one product for each of its entries


@dataclass(frozen=True)
class LinearReading:
    """What the linear operators on the way of a state make of a step.

    Attributes:
        name: the name of the method.
        system: what it integrates.
        h: its step size; None where none can be told.
        convention: how h was fixed.
        residual: relative deviation of the step from it.
        notes: what else was seen.
        evidence: ``"proven"`` where the structure says it, ``"measured"`` where the spectrum does.
    """

    name: str
    system: str
    h: float | None
    convention: str
    residual: float
    notes: tuple[str, ...]
    evidence: str = "proven"


class LinearParts:
    """The affine ways from the one source of a piece to its target, and what joins them.

    Attributes:
        piece: the stretch of the graph.
        ways: nodes on the ways, in order.
        joins: values that are added on the way, made of the source by what is not affine; ``Value(node, ADDED)`` for
            what an operation adds to its first input.
        beside: whether something is put beside the state rather than added to it.
        solves: whether a linear system is solved on the way, in a basis in which it is diagonal or as it is.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._allowed = _affine_inputs(piece)
        self._wanted = {piece.targets[0]}
        ways = []
        joins: dict[Value, None] = {}
        self._added: set[Node] = set()
        self.beside = False
        for node in reversed(piece.nodes):
            if node not in self._allowed or not any(v.node is node for v in self._wanted):
                continue
            ways.append(node)
            self._wanted.update(self._allowed[node])
            others = [v for v in piece.inputs(node) if v not in self._allowed[node]]
            self.beside = self.beside or (bool(others) and operation(node) in JOINS | WRITES)
            if others and operation(node) in ADDENDS:
                joins[Value(node, ADDED)] = None
                self._added.add(node)
            else:
                joins.update(dict.fromkeys(others))
        self.ways = tuple(reversed(ways))
        self.joins = tuple(joins)
        self.solves = any(operation(node) in SOLVES for node in self.ways) or self.quotient == BACKWARD_EULER

    @property
    def is_whole(self) -> bool:
        """Whether nothing else leads from the source to the target: the step is affine."""
        return not self.joins and len(self.ways) == len(self.piece.nodes)

    @property
    def has_field(self) -> bool:
        """Whether something that joins depends on the source, and not on what is held fixed alone."""
        reached = {self.piece.sources[0]}
        for node in self.piece.nodes:
            if any(v in reached for v in self.piece.inputs(node)):
                reached.update(outputs_of(node))
        return any((j if j.output != ADDED else Value(j.node, 0)) in reached for j in self.joins)

    @property
    def quotient(self) -> str | None:
        """What a division between Fourier transforms solves for; None where it is none of a known method.

        By 1 + h A with A >= 0 it is a backward Euler step in the basis in which A is diagonal; where what is divided
        was multiplied by 1 - h A before, one of the trapezoidal rule with 2 h.
        """
        divisors = [n for n in self.ways if operation(n) == "Div"]
        products = [n for n in self.ways if operation(n) == "Mul"]
        others = [n for n in self.ways if n not in (*divisors, *products)]
        between = any(operation(n) in TRANSFORMS for n in others) and all(
            operation(n) in TRANSFORMS | MOVES | ADDS for n in others
        )
        below = [d for n in divisors if (d := _constant(n)) is not None]
        above = [m for n in products if (m := _constant(n)) is not None]
        if (
            not between
            or len(below) != 1
            or bool((below[0].real < 1 - 1e-6).any())
            or bool((below[0] == below[0].flatten()[0]).all())
        ):
            return None
        if not products and len(divisors) == 1:
            return BACKWARD_EULER
        both = len(above) == len(products) == 1 and len(divisors) == 1
        return "trapezoid" if both and bool(((above[0] + below[0] - 2).abs() <= 1e-6 * below[0].abs()).all()) else None

    def pulled(self, w: Tensor, since: Node | None = None) -> dict[Value, Tensor]:
        """P^T w at the source, and S^T w at what joins; or at what the ways read that begin with a node."""
        ways = self.ways if since is None else self.ways[self.ways.index(since) :]
        edges = {n: [*self._allowed[n], *(v for v in self.piece.inputs(n) if v in self.joins)] for n in ways}
        edges.update({n: list(self._allowed[n]) for n in self._added if n in edges})
        return pull(self.piece.graph, ways, edges, {self.piece.targets[0]: w}, self._added)

    def behind(self, join: Value) -> list[tuple[Node, Value]]:
        """The affine operations on one value, one after the other, from which a join comes; the last one first."""
        found: list[tuple[Node, Value]] = []
        value = join
        while value.output != ADDED and value not in self.piece.ends:
            edges = list(dict.fromkeys(self.piece.inputs(value.node)))
            if len(edges) != 1 or not _affine_in(self.piece, value.node, edges):
                break
            found.append((value.node, edges[0]))
            value = edges[0]
        return found


def _constant(node: Node) -> Tensor | None:
    """The constant entries by which a node multiplies or divides; None for a number."""
    saved = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    found = [t.detach() for t in saved if isinstance(t, Tensor) and t.numel() > 1]
    return found[0] if len(found) == 1 else None


def _affine_inputs(piece: Piece) -> dict[Node, list[Value]]:
    """For every node that is affine in what an affine way from the source brings, these inputs."""
    reached: set[Value] = {piece.sources[0]}
    found: dict[Node, list[Value]] = {}
    for node in piece.nodes:
        edges = piece.inputs(node)
        taken = [v for v in edges if v in reached]
        if not taken:
            continue
        adds = operation(node) in ADDENDS and len(edges) > 1
        if taken == edges[:1] if adds else _affine_in(piece, node, edges):
            found[node] = taken
            reached.update(outputs_of(node))
    return found if piece.targets[0] in reached else {}


def _affine_in(piece: Piece, node: Node, edges: Sequence[Value]) -> bool:
    """Whether a node is affine in its inputs that depend on the source."""
    if node in piece.owned or node in piece.graph.composites:
        return False
    if operation(node) in SOLVES:  # in the right side, whose matrix is given
        return list(edges) == [right_side(node)]
    if operation(node) == "Div" and len(edges) == 1:
        parent, output = node.next_functions[0]
        return parent is not None and list(edges) == [Value(parent, output)]
    return is_affine(node, len(edges))


class _Fitted:
    """Products with P, S and what stands behind S, with random cotangents."""

    def __init__(self, parts: LinearParts) -> None:
        self.parts = parts
        target, self.source = parts.piece.targets[0], parts.piece.sources[0]
        self.drawn = [random_tensors([target], seed)[0] for seed in range(2)]
        self.arrived = [parts.pulled(w) for w in self.drawn]
        self.tolerance = _ROUNDINGS * max(torch.finfo(meta_of(v).dtype).eps for v in (target, self.source))

    def at(self, value: Value) -> Tensor:
        """Both cotangents at a value, side by side."""
        return _stacked([a[value] for a in self.arrived])

    @property
    def random(self) -> Tensor:
        """The cotangents as they were drawn."""
        return _stacked(self.drawn)

    def is_number(self, value: Value) -> bool:
        """Whether what stands before a value is a number for each entry of its own, as scales and norms have."""
        w, s = self.random, self.at(value)
        if s.shape != w.shape:
            return False
        a = float((w * s).sum() / (w * w).sum())
        if float((s - a * w).norm()) <= self.tolerance * float(s.norm()):
            return True
        ratios = s / w
        return bool(torch.allclose(ratios[0], ratios[1], rtol=1e-3, atol=1e-4))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(t.real if t.is_complex() else t).reshape(-1) for t in tensors]).double().cpu()


def operator_of(piece: Piece, source: Layout, target: Layout) -> str | None:
    """What an affine piece is to the equation that a step solves.

    Returns:
        ``"backward Euler"`` where a linear system is solved, or ``"trapezoid"``; ``"a damping linear part"`` where the
        spectrum is that of (1 + h A)^-1 or exp(-h A); ``"number"`` for a number for each entry; None for anything else.
    """
    parts = LinearParts(piece)
    if not parts.ways:
        return "number" if piece.sources[0] == piece.targets[0] else None
    if not parts.is_whole or meta_of(piece.sources[0]).numel != meta_of(piece.targets[0]).numel:
        return None
    fitted = _Fitted(parts)
    if fitted.is_number(piece.sources[0]):
        return "number"
    if parts.solves or parts.quotient:
        return parts.quotient or BACKWARD_EULER
    M = _dense(fitted, fitted.source, source, target)
    return "a damping linear part" if M is not None and _is_contraction(M) else None


def linear_reading(piece: Piece, source: Layout, target: Layout, *, at_once: bool = True) -> LinearReading | None:
    """What the linear operators on the way of a state make of a step of one sum; None where there are none.

    Args:
        piece: from one source to one target of as many entries.
        source: how the entries of the source belong to samples.
        target: and those of the target.
        at_once: whether skip and branch both begin at the source, and not at a linear function of it.
    """
    parts = LinearParts(piece)
    if not parts.joins or parts.beside or meta_of(piece.sources[0]).dtype.is_complex:
        return None
    fitted = _Fitted(parts)
    if any(j not in fitted.arrived[0] for j in (*parts.joins, piece.sources[0])):
        return None
    numbers = [fitted.is_number(v) for v in (piece.sources[0], *parts.joins)]
    if all(numbers):
        return None
    branch = max(parts.joins, key=lambda j: float(fitted.at(j).norm()))
    last = numbers[1 + parts.joins.index(branch)]  # whether nothing but numbers follows the addition
    if not last:
        return _implicit(fitted, branch, source, target)
    return _exponential(fitted, branch, source, target) or (_linear_skip(parts) if at_once else None)


def _linear_skip(parts: LinearParts) -> LinearReading:
    if not parts.has_field:
        why = "the state is multiplied by a matrix, and what does not depend on it is added"
        return LinearReading("linear recurrence (matrix)", "x' = P x + u, P a matrix", None, "none", 0.0, (why,))
    why = "the skip is a linear map of the state's own space, P x, and no multiple of the identity"
    return LinearReading(LINEAR_SKIP, "x' = P x + f(x), P a matrix", None, "none", 0.0, (why,))


def _implicit(fitted: _Fitted, branch: Value, source: Layout, target: Layout) -> LinearReading | None:
    """P as an affine function of S."""
    p, w = fitted.at(fitted.source), fitted.random
    s = (behind := _scale(fitted, branch)) * fitted.at(branch)
    c = behind * _scale_before(fitted, branch)
    s = s if s.shape == w.shape else _before_transforms(fitted, branch)
    if s.shape != p.shape or s.shape != w.shape:
        return None
    columns = torch.stack([s.flatten(), -w.flatten()], dim=1)
    solution = torch.linalg.lstsq(columns, p.flatten()).solution
    alpha, r = solution.tolist()
    residual = float((columns @ solution - p.flatten()).norm() / p.norm())
    if residual > fitted.tolerance:
        return None
    slack = 10 * fitted.tolerance
    declared = "h: the number that multiplies the branch" if abs(c - 1) > slack else "h = 1: only h f can be seen"
    if abs(alpha) * float(s.norm() / w.norm()) <= slack:
        # P is a number: what follows the addition undoes on the skip what it does to the field
        if abs(r + 1) > slack:
            return None
        why = "the state itself is passed on as it is; what moves it passes a linear operator M that the skip undoes"
        return LinearReading("semi-implicit (stabilised by a linear operator)", "x' = f(x), x' = x + M h f(x)", c,
                             declared, residual, (why,))  # fmt: skip
    h = (1 + r) / alpha
    if abs(r) <= slack:
        return _behind(fitted, branch, source, target, abs(h), declared, residual)
    theta = 1 / (1 + r)
    if not 0 < theta < 1:
        return None
    told = "h: told from the operators before state and branch, with theta"
    linear = "Crank-Nicolson" if abs(theta - 0.5) <= slack else f"theta = {theta:.3g}"
    why = f"the linear part is taken with theta = {theta:.3g}: the same operator stands on both sides of the equation"
    return LinearReading(
        f"implicit-explicit Euler ({linear} for the linear part)", "x' = f(x) - A x", abs(h), told, residual, (why,)
    )


def _before_transforms(fitted: _Fitted, branch: Value) -> Tensor:
    """Both cotangents at the value that a branch is the Fourier transform of, with the numbers between."""
    at, arrived = branch, [a[branch] for a in fitted.arrived]
    for node, inner in fitted.parts.behind(branch):
        if meta_of(at).shape == meta_of(fitted.source).shape or operation(node) not in TRANSFORMS | MOVES | SCALES:
            break
        arrived = [pull(fitted.parts.piece.graph, [node], {node: [inner]}, {at: a})[inner] for a in arrived]
        at = inner
    return _stacked(arrived)


def _behind(
    fitted: _Fitted, branch: Value, source: Layout, target: Layout, h: float, declared: str, residual: float
) -> LinearReading | None:
    """One operator on the sum of state and branch: x' = M (x + h f(x))."""
    behind = "a linear map M follows the addition, x' = M (x + h f(x))"
    system = "x' = f(x) - A x, M = (1 + h A)^-1 (or exp(-h A), an integrating factor)"
    if fitted.parts.solves:  # with whatever matrix: the code takes a part of its equation at the new state
        why = f"{behind}; a linear system is solved for it"
        return LinearReading("semi-implicit Euler (linear solve)", system, h, declared, residual, (why,))
    if fitted.parts.quotient:
        why = f"{behind}; in Fourier space it is (1 - h A / 2) / (1 + h A / 2)"
        name, system = f"Lie splitting (Euler, {fitted.parts.quotient})", "x' = f(x) - A x"
        return LinearReading(name, system, h, declared, residual, (why,))
    M = _dense(fitted, fitted.source, source, target)
    name = "semi-implicit (linear map behind the addition)"
    if M is None:
        why = f"{behind}; too large to look at its eigenvalues: with M = (1 + h A)^-1 a semi-implicit step"
        return LinearReading(
            "linear map behind the addition", "x' = M (x + f(x))", h, declared, residual, (why,), "measured"
        )
    if _is_contraction(M):
        why = f"{behind}; its eigenvalues are those of a (1 + h A)^-1 with A >= 0: a semi-implicit step"
        return LinearReading(name, system, h, declared, residual, (why,), "measured")
    if any(operation(n) not in TRANSFORMS | MOVES | SCALES | ADDS | {"Div"} for n in fitted.parts.ways):
        return None  # a layer of its own: that it is no step is said elsewhere
    why = f"{behind}; its eigenvalues are not those of a (1 + h A)^-1 with A >= 0"
    return LinearReading("linear map behind the addition", "x' = M (x + f(x))", h, declared, residual, (why,))


def _is_contraction(M: Matrix) -> bool:
    """Whether the eigenvalues are those of (1 + h A)^-1, A with none in the left half plane: a disc on [0, 1]."""
    values = np.linalg.eigvals(M)
    return bool((np.abs(values - 0.5) <= 0.5 + 1e-6).all()) and bool((np.abs(values) > 1e-12).all())


def _dense(fitted: _Fitted, at: Value, source: Layout, target: Layout, behind: int = 0) -> Matrix | None:
    """What stands before the source or a join, with some operations behind that: ``(batch, n, n)``, transposed."""
    parts = fitted.parts
    wide = Space([meta_of(parts.piece.targets[0])], [target])
    if wide.size > _LARGEST_DENSE:
        return None
    chain = parts.behind(at)[:behind] if at != fitted.source else []
    end = chain[-1][1] if chain else at
    if meta_of(end).numel != meta_of(parts.piece.targets[0]).numel:
        return None
    eye = torch.eye(wide.size, dtype=wide.dtype, device=wide.device).expand(wide.batch, -1, -1)
    rows = []
    for w in wide.unflatten(eye)[0]:
        g = parts.pulled(w)[at]
        value = at
        for node, inner in chain:
            g = pull(parts.piece.graph, [node], {node: [inner]}, {value: g})[inner]
            value = inner
        rows.append(g)
    layout = source if end == fitted.source or meta_of(end).shape == meta_of(fitted.source).shape else target
    try:
        columns = layout.columns(torch.stack(rows).movedim(0, -1), meta_of(end).shape)
    except RuntimeError:  # another shape, whose samples are not told
        return None
    square = columns.shape[-1] == columns.shape[-2]  # or real entries on one side, complex ones on the other
    return np.asarray(columns.detach().double().cpu().numpy(), dtype=np.complex128) if square else None


def _exponential(fitted: _Fitted, branch: Value, source: Layout, target: Layout) -> LinearReading | None:
    """P = exp(h L) and S = c phi_1(h L) in one basis."""
    P = _dense(fitted, fitted.source, source, target)
    if P is None:
        return None
    values, basis = np.linalg.eig(P)
    slack = fitted.tolerance * float(np.linalg.cond(basis).max())
    if np.abs(values).min() <= 1e-12 or slack > _SEEN:
        return None
    logs = np.log(values)
    near = np.abs(logs) < 1e-8
    phi = np.where(near, 1.0, (values - 1) / np.where(near, 1.0, logs))
    if np.abs(phi - phi.flat[0]).max() <= 1e-6:
        return None  # a number, which says nothing of the operator
    for count in range(len(fitted.parts.behind(branch)) + 1):
        S = _dense(fitted, branch, source, target, count)
        if S is None or S.shape != P.shape:
            continue
        inner = np.linalg.solve(basis, S @ basis)
        c = complex((np.einsum("bii->bi", inner) * phi.conj()).sum() / (np.abs(phi) ** 2).sum())
        expected = (c * phi)[..., None] * np.eye(phi.shape[-1])
        residual = float(np.linalg.norm(inner - expected) / max(float(np.linalg.norm(inner)), 1e-300))
        if residual > max(slack, fitted.tolerance) or abs(c.imag) > slack * abs(c):
            continue
        h = abs(c.real) * _scale(fitted, branch, count)
        declared = "h: the number that multiplies phi_1" if abs(h - 1) > slack else "h = 1: only h f can be seen"
        why = f"the skip is exp(h L) and the branch passes h phi_1(h L), the same L; eigenvalues of h L from " \
              f"{float(logs.real.min()):.3g} to {float(logs.real.max()):.3g} (real parts)"  # fmt: skip
        return LinearReading("exponential Euler (matrix)", "x' = L x + f(x)", h, declared, residual, (why,))
    return None


def _scale_before(fitted: _Fitted, branch: Value) -> float:
    """The number that multiplies a branch on its way to the operator that follows."""
    if branch.output == ADDED:
        return 1.0
    total, value = 1.0, branch
    while True:
        takers = [n for n in fitted.parts.ways if value in fitted.parts.piece.inputs(n)]
        if len(takers) != 1 or operation(takers[0]) not in MOVES | ADDS | SCALES | {"Div"}:
            return total
        made = Value(takers[0], 0)
        w = random_tensors([made], seed=0)[0]
        arrived = pull(fitted.parts.piece.graph, takers, {takers[0]: [value]}, {made: w}).get(value)
        if arrived is None or arrived.numel() != w.numel():
            return total
        factors = arrived.reshape(-1) / w.reshape(-1)
        if operation(takers[0]) not in MOVES and float((factors - factors[0]).abs().max()) > fitted.tolerance:
            return total
        total, value = total * float(arrived.norm() / w.norm()), made


def _scale(fitted: _Fitted, branch: Value, count: int = 0) -> float:
    """The number that multiplies the branch behind some of the operations on it, up to the next of its matrices."""
    total, value = 1.0, branch
    for place, (node, inner) in enumerate(fitted.parts.behind(branch)):
        if place >= count:
            w = random_tensors([value], seed=0)[0]
            arrived = pull(fitted.parts.piece.graph, [node], {node: [inner]}, {value: w}).get(inner)
            if operation(node) not in MOVES | SCALES | {"Div"} or arrived is None or arrived.numel() != w.numel():
                break
            factors = arrived.reshape(-1) / w.reshape(-1)
            if operation(node) not in MOVES and float((factors - factors[0]).abs().max()) > fitted.tolerance:
                break  # a number for each entry: the field's own
            total *= float(arrived.norm() / w.norm())
        value = inner
    return total
