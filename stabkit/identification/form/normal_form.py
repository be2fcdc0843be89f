"""The affine normal form of a step: new states and stage inputs as linear combinations of old states and stages.

    Y_i = sum_j U_ij x_j + sum_m A_im k_m,   k_i = F_i(Y_i),   x'_j = sum_l V_jl x_l + sum_i B_ji k_i.

A stage F_i is a maximal region of operations that are not linear; it begins where a linear combination ends in which
a state takes part, at a state itself, or at another stage that also enters such a combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.fields.shared import key_of, parameters_of
from stabkit.identification.form.coefficients import Coefficient, LinearCombination
from stabkit.identification.form.composed_fields import Call, composed_fields
from stabkit.identification.form.left_out import without_left_out
from stabkit.identification.form.operations import JOINS, MOVES, has_matrix, is_affine, is_opaque
from stabkit.identification.form.pieces import ADDED, Piece, pull
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors

Terms = dict[Value, Coefficient]
Regions = dict[Value, tuple[tuple[Node, ...], tuple[Value, ...]]]  # of stages: their nodes, and where they begin
_ROUNDINGS = 4096.0  # products with a whole field, in another order
_SPREAD = 1e-3  # relative; roundings of half precision, whose entries are alike, are smaller


@dataclass(frozen=True, eq=False)
class Stage:
    """A maximal nonlinear region.

    Attributes:
        output: what it gives out.
        nodes: its operations, in order.
        entries: the values at which it begins.
        inputs: these values as linear combinations of states and earlier stages.
        is_affine: whether all its operations are affine in what depends on the state.
        is_weightless: whether it has no matrix and no kernel: a norm, an activation.
        opaque: its operations whose inside is not on the graph.
        key: equal for two stages that evaluate the same field.
    """

    output: Value
    nodes: tuple[Node, ...]
    entries: tuple[Value, ...]
    inputs: tuple[Terms, ...]
    is_affine: bool
    is_weightless: bool
    opaque: tuple[str, ...]
    key: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class NormalForm:
    """New states and stage inputs in terms of old states and stages.

    Attributes:
        piece: the stretch of the graph.
        stages: in the order in which they are computed.
        forms: every target as a linear combination.
        merges: how many additions join a state with something else.
    """

    piece: Piece
    stages: tuple[Stage, ...]
    forms: tuple[Terms, ...]
    merges: int

    @property
    def sources(self) -> tuple[Value, ...]:
        """The old states."""
        return self.piece.sources

    @property
    def targets(self) -> tuple[Value, ...]:
        """The new states."""
        return self.piece.targets


def normal_form(piece: Piece, *, names: Mapping[int, str], calls: Sequence[Call] = ()) -> NormalForm:
    """The affine normal form of a stretch of a graph.

    Args:
        piece: the stretch; what its fields own besides is found here.
        names: parameters and buffers of the model by address, which tell shared fields.
        calls: calls of modules that are called repeatedly, as intervals of the clock. What is called at several points
            of one step is a field as a whole, whatever it adds inside. A factor that a field's own
            module applies to its result, such as cos(t), belongs to the field; without this the stages of a
            Runge-Kutta method would carry it.
    """
    layout = _laid_out(piece, names)
    for fields in composed_fields(piece, calls):
        owning = piece.owning(fields)
        whole = layout if owning is piece else _laid_out(owning, names)
        if whole is not layout and _is_simpler(whole.measured, layout.measured):
            layout = whole
            break
    owning = layout.piece.owning(_owned_scalings(layout, calls))
    return layout.measured if owning is layout.piece else _laid_out(owning, names).measured


@dataclass(frozen=True, eq=False)
class _Layout:
    """A normal form before its coefficients are measured: most layouts are only looked at, and then made anew.

    Attributes:
        piece: the stretch of the graph.
        names: parameters and buffers of the model by address.
        regions: of the stages.
        merges: how many additions join a state with something else.
    """

    piece: Piece
    names: Mapping[int, str]
    regions: Regions
    merges: int

    @cached_property
    def measured(self) -> NormalForm:
        """With the coefficients, which take products."""
        piece, rank = self.piece, {node: i for i, node in enumerate(self.piece.nodes)}
        ordered = sorted(self.regions, key=lambda v: (rank[v.node], v.output))
        stages = _told_apart(piece, [_stage(piece, atom, *self.regions[atom], self.names) for atom in ordered])
        forms = tuple(LinearCombination(piece, target).coefficients() for target in piece.targets)
        return NormalForm(piece, stages, forms, self.merges)


def _is_simpler(whole: NormalForm, form: NormalForm) -> bool:
    """Whether a form with composed fields passes each state on as a number, and says more than the other.

    It has fewer fields, or passes states or values of fields on by numbers which the other moves or turns the sign of.
    """
    kinds = {c.kind for terms in whole.forms for a, c in terms.items() if a in whole.sources}
    before = {c.kind for terms in form.forms for a, c in terms.items() if a in form.sources}
    if not whole.stages or not kinds or kinds & {"moved", "mixed", "part"}:
        return False
    fields = [len({stage.key for stage in f.stages}) for f in (whole, form)]
    passed = [_of_fields(f) <= {"scalar", "dropout"} for f in (whole, form)]
    return fields[0] < fields[1] or bool(before & {"moved", "mixed", "part"}) or passed == [True, False]


def _of_fields(form: NormalForm) -> set[str]:
    """The kinds of coefficients with which values of fields enter new states and stages.

    Entries that are added to each other make a map that belongs to the field; its number then stands for none.
    """
    rows = (*form.forms, *(terms for stage in form.stages for terms in stage.inputs))
    found = [c for terms in rows for atom, c in terms.items() if atom not in form.sources]
    maps = [c.kind == "scalar" and c.high - c.low > _SPREAD * max(abs(c.high), abs(c.low)) for c in found]
    return {"map" if is_map else c.kind for c, is_map in zip(found, maps, strict=True)}


def _owned_scalings(layout: _Layout, calls: Sequence[Call]) -> set[Node]:
    """Gains of norms, and scalings of stages in the call of a repeated module that adds nothing to a state."""
    piece, stages = layout.piece, layout.regions
    merged = [value.node._sequence_nr() for value in piece.merges]
    only = _only_atoms(piece)
    owned: set[Node] = set()
    for node, edges in piece.linear.items():
        if len(edges) != 1 or operation(node) in MOVES or Value(node, 0) in piece.carrying:
            continue
        atom = only[edges[0].node] if edges[0].node in only and edges[0] not in piece.ends else edges[0]
        if atom is None or atom not in stages:
            continue
        first, last = stages[atom][0][0]._sequence_nr(), node._sequence_nr()
        if piece.is_norm(atom) and piece.has_factors(node):
            owned.add(node)  # what is normalised has no size of its own: its gain for each channel gives it one
            continue
        around = [c for c in calls if c[0] <= first and last < c[1]]
        if any(not any(start <= time < stop for time in merged) for start, stop, _ in around):
            owned.add(node)
    return owned


def _only_atoms(piece: Piece) -> dict[Node, Value | None]:
    """The one atom that a linear operation is a multiple of; None where it combines several."""
    found: dict[Node, Value | None] = {}
    for node in piece.nodes:
        if node in piece.linear:
            below = {v if v in piece.ends else found.get(v.node, v) for v in piece.linear[node]}
            below |= {Value(node, ADDED)} if node in piece.added else set()
            found[node] = below.pop() if len(below) == 1 else None
    return found


def _laid_out(piece: Piece, names: Mapping[int, str]) -> _Layout:
    atoms: dict[Value, None] = {}  # stages, in the order in which they were met
    entered: dict[Value, None] = {}
    paths: set[Node] = set()
    for target in piece.targets:
        found, path = piece.expand(target)
        atoms.update(dict.fromkeys(v for v in found if v not in piece.ends))
        paths |= path
    regions: Regions = {}
    while True:
        stops = set(atoms) | piece.ends
        combined = _combined(piece, stops)
        regions = {atom: _region(piece, atom, stops, combined) for atom in atoms}
        entered = dict.fromkeys(entry for _, entries in regions.values() for entry in entries)
        more = [v for entry in entered for v in piece.expand(entry)[0] if v not in piece.ends and v not in atoms]
        if not more:
            break
        atoms.update(dict.fromkeys(more))
    regions = _composed(piece, _divide_repeated(piece, regions), names)
    return _Layout(piece, names, regions, sum(Value(node, 0) in piece.merges for node in paths))


def _region(
    piece: Piece, atom: Value, stops: set[Value], combined: set[Node]
) -> tuple[tuple[Node, ...], tuple[Value, ...]]:
    """The operations of a stage and the values at which it begins."""
    nodes: set[Node] = set()
    entries: dict[Value, None] = {}
    stack = [atom.node]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for value in piece.inputs_of(atom) if node is atom.node else piece.inputs(node):
            if _is_entry(piece, value, stops, combined):
                entries[value] = None
            else:
                stack.append(value.node)
    return tuple(n for n in piece.nodes if n in nodes), without_left_out(piece, atom, nodes, tuple(entries))


def _combined(piece: Piece, stops: set[Value]) -> set[Node]:
    """The operations that combine sources and stages alone, by numbers: nothing is put side by side or gated.

    Told for all at once, since each by itself would be followed back over all before it: a scan over time is one long
    combination.
    """
    found: set[Node] = set()
    for node in piece.nodes:
        if node not in piece.linear or piece.is_gated({node}):
            continue
        joins = operation(node) in JOINS and len(set(piece.inputs(node))) > 1
        if joins or (node in piece.added and Value(node, ADDED) not in stops):
            continue
        if all(v in stops or (v.output != ADDED and v.node in found) for v in piece.linear[node]):
            found.add(node)
    return found


def _is_entry(piece: Piece, value: Value, stops: set[Value], combined: set[Node]) -> bool:
    if value in stops:
        return True
    if value in piece.merges:  # one of parts of a state lies inside a field
        return any(meta_of(value).numel == meta_of(source).numel for source in piece.sources)
    return value.output != ADDED and value.node in combined


def _stage(
    piece: Piece, atom: Value, nodes: tuple[Node, ...], entries: tuple[Value, ...], names: Mapping[int, str]
) -> Stage:
    inputs: list[Terms] = []
    for entry in entries:
        terms = (
            LinearCombination(piece, entry).coefficients()
            if entry not in piece.ends
            else {entry: Coefficient("scalar", 1, 1, 1, 0)}
        )
        if terms and not any(_same(terms, known) for known in inputs):
            inputs.append(terms)
    return Stage(
        output=atom,
        nodes=nodes,
        entries=entries,
        inputs=tuple(inputs),
        is_affine=all(is_affine(n, len(piece.inputs_of(atom) if n is atom.node else piece.inputs(n))) for n in nodes),
        is_weightless=not any(has_matrix(n) or is_opaque(n) for n in nodes),
        opaque=tuple(sorted({operation(n) for n in nodes if is_opaque(n)})),
        key=key_of(nodes, names),
    )


def stage_vjp(piece: Piece, stage: Stage, cotangent: Tensor) -> dict[Value, Tensor]:
    """A cotangent of a stage's output pulled back to the values at which it begins."""
    allowed = {node: piece.inputs(node) for node in stage.nodes}
    given = cotangent.to(meta_of(stage.output).dtype)  # a field may be evaluated in another precision than the state
    return pull(piece.graph, list(stage.nodes), allowed, {stage.output: given})


def _told_apart(piece: Piece, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages of the same weights at one argument that give different things are different fields.

    What goes along the edges of a graph is added to both ends of each: g_i + g_j, one after the other, with other
    indices and another sign. Weights do not tell these two, their products with one vector do.
    """
    out: list[Stage] = []
    for stage in stages:
        alike = [s for s in out if s.key[: len(stage.key)] == stage.key and _at_one_point(s, stage)]
        fields: list[tuple[object, ...]] = list(dict.fromkeys(s.key for s in alike))
        for s in alike:
            if not _acts_as(piece, s, stage):
                continue
            fields, stage = [], replace(stage, key=s.key)
            break
        out.append(replace(stage, key=(*stage.key, len(fields))) if fields else stage)
    return tuple(out)


def _at_one_point(a: Stage, b: Stage) -> bool:
    return len(a.inputs) == len(b.inputs) and all(_same(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


def _acts_as(piece: Piece, a: Stage, b: Stage) -> bool:
    """Whether two stages pull one random cotangent back alike."""
    if meta_of(a.output).shape != meta_of(b.output).shape or len(a.entries) != len(b.entries):
        return False
    (w,) = random_tensors([a.output], seed=0)
    left, right = (stage_vjp(piece, s, w) for s in (a, b))
    for x, y in zip(a.entries, b.entries, strict=True):
        if x not in left or y not in right:
            return x not in left and y not in right
        size = float(left[x].norm())
        if float((left[x] - right[y]).norm()) > _ROUNDINGS * torch.finfo(left[x].dtype).eps * size:
            return False
    return True


def _same(a: Terms, b: Terms) -> bool:
    return a.keys() == b.keys() and all(replace(a[k], residual=0.0) == replace(b[k], residual=0.0) for k in a)


def _composed(piece: Piece, regions: Regions, names: Mapping[int, str]) -> Regions:
    """Join a stage into what alone takes it, beside the state, and is no stage: tanh(K x - c x) is one field.

    So is M (x + f(x)), since a linear map of a sum is the sum of two fields at x (port-Hamiltonian systems); a linear f
    is left, whose powers make methods. Other takers with weights of their own are stages, as in x + g(x + f(x)).
    """
    out = dict(regions)
    given_out = {atom for target in piece.targets for atom in piece.expand(target)[0]}

    def joins(inner: Value, taker: Value) -> bool:
        weightless = not any(has_matrix(n) or is_opaque(n) or parameters_of([n], names) for n in regions[taker][0])
        bends = inner in out and not is_linear(inner)
        joined = weightless or (bends and is_linear(taker))
        return inner in out and inner not in given_out and inner.output != ADDED and joined

    def is_linear(atom: Value) -> bool:
        return all(
            is_affine(n, len(piece.inputs_of(atom) if n is atom.node else piece.inputs(n))) for n in out[atom][0]
        )

    while True:
        takers: dict[Value, set[Value]] = {}
        beside: set[Value] = set()  # what enters a stage together with something else
        for taker, (_, entries) in out.items():
            for entry in entries:
                atoms = [entry] if entry in out else piece.expand(entry)[0]
                beside.update(atoms if len(atoms) > 1 else ())
                for atom in atoms:
                    takers.setdefault(atom, set()).add(taker)
        inner = next(
            (a for a, who in takers.items() if a in beside and len(who) == 1 and joins(a, next(iter(who)))), None
        )
        if inner is None:
            return out
        taker = next(iter(takers[inner]))
        nodes, entries = out[taker]
        more, begins = out.pop(inner)
        inside, left = {*nodes, *more}, dict.fromkeys(begins)
        for entry in entries:
            atoms, path = ([entry], set[Node]()) if entry in regions else piece.expand(entry)
            if inner in atoms:
                inside |= path
                left.update(dict.fromkeys(a for a in atoms if a != inner))
            else:
                left[entry] = None
        out[taker] = (tuple(n for n in piece.nodes if n in inside), tuple(left))


def _divide_repeated(piece: Piece, regions: Regions) -> Regions:
    """Cut a chain of operations that repeats those of another stage m times into m stages (FractalNet's columns)."""
    patterns = {atom: _pattern(nodes) for atom, (nodes, _) in regions.items()}
    out = dict(regions)
    for atom, (nodes, entries) in regions.items():
        if all(is_affine(node, 1) for node in nodes):
            continue  # D^T D x beside D^T x is one linear map, and not two stages
        for pattern in patterns.values():
            times = len(patterns[atom]) // max(1, len(pattern))
            if times < 2 or pattern * times != patterns[atom] or not pattern:
                continue
            cut = _cut_chain(piece, nodes, len(pattern))
            if cut is None:
                continue
            del out[atom]
            begins: tuple[Value, ...] = entries
            for part in cut:
                end = atom if part[-1] is nodes[-1] else Value(part[-1], 0)
                out[end] = (part, begins)
                begins = (end,)
            break
    return out


def _pattern(nodes: Sequence[Node]) -> tuple[str, ...]:
    return tuple(operation(n) for n in nodes if operation(n) not in MOVES)


def _cut_chain(piece: Piece, nodes: tuple[Node, ...], length: int) -> list[tuple[Node, ...]] | None:
    """Parts of ``length`` operations each, when every operation reads just the one before it."""
    if any(len(set(piece.inputs(node))) != 1 for node in nodes):
        return None
    parts: list[list[Node]] = [[]]
    count = 0
    for node in nodes:
        moves = operation(node) in MOVES
        if count == length and not moves:
            parts.append([])
            count = 0
        parts[-1].append(node)
        count += not moves
    return [tuple(part) for part in parts]
