"""Methods of several states: momentum, multistep, reversible, gated and oscillating pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch.autograd.graph import Node

from stabkit.identification.evidence.confirmation import Check, are_adjoint, is_symmetric, volume
from stabkit.identification.evidence.reproduction import confirmed
from stabkit.identification.fields.composites import with_composite_fields
from stabkit.identification.fields.field_values import continued_fields
from stabkit.identification.fields.shared import parameters_of
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.formed_ahead import as_made
from stabkit.identification.form.grouping import split_before
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import JOINS, is_opaque
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots, joined
from stabkit.identification.form.sub_steps import composed_name, with_readout
from stabkit.identification.form.tableau import Blocks, blocks
from stabkit.identification.names.alternating import alternating_affine
from stabkit.identification.names.by_entry import OWN_SIZES, told_by_entry
from stabkit.identification.names.compositions import direction, name_composition, shears
from stabkit.identification.names.operator_splittings import name_splitting
from stabkit.identification.names.single import Name
from stabkit.identification.names.systems import (
    ADDITIVE_COUPLING,
    HAMILTONIAN,
    MEMORY_CELL,
    REVERSIBLE,
    UNNAMED_PAIR,
    name_several_states,
)
from stabkit.identification.record import Identification
from stabkit.identification.steps.around_addition import masked
from stabkit.identification.steps.composed_steps import LEAPFROG_OR
from stabkit.identification.steps.given_increments import with_increments, without_increments
from stabkit.identification.steps.memory_cells import is_memory_cell
from stabkit.identification.steps.noise import with_noise
from stabkit.identification.steps.pending import name_pending, told_of
from stabkit.identification.steps.proximal import proximal_maps
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of

LEAPFROG = "leapfrog"
_EITHER = (
    "x' = f(x, t) by the two-step midpoint rule, or p' = F(q), q' = G(p) in turn: one map, weights of its own at each"
)
PARTS = ", parts of one tensor"
_UNSPECIFIC = ("unnamed", "general linear method", "Adams-Bashforth type")  # what fields with a linear part may read as


def read_several_states(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification:
    """The method of a step whose old or new state is a tuple of tensors."""
    start, stop = steps[0], steps[-1] + 1
    nodes = around.nodes(start, stop)
    opaque = sorted({operation(n) for n in nodes if is_opaque(n)})
    if len(found.sources) != len(found.targets):
        return _change_of_count(around, found, steps)
    if found.split or len({value.node for value in found.sources}) == 1 or split_before(around.flow, start):
        found = _paired(around, found, steps)
    found = as_made(around, found, start, stop)
    form = around.normal_form(start, stop, found)
    record = _named(around, found, form, steps, opaque)
    if record.name.startswith(_UNSPECIFIC):
        for owned in continued_fields(form):
            other = around.normal_form(start, stop, found, owned | form.piece.owned)
            better = _named(around, found, other, steps, opaque)
            if better.method is not None and not better.name.startswith(_UNSPECIFIC):
                return better
    return _past_proximal_maps(around, found, steps, opaque, record)


def _past_proximal_maps(
    around: Surroundings, found: Slots, steps: tuple[int, ...], opaque: Sequence[str], record: Identification
) -> Identification:
    """The record of a step with proximal maps behind its additions, which are taken off where its name is none else."""
    maps = proximal_maps(around.flow, around.whole(steps[0], steps[-1] + 1, found)) if _is_unnamed(record) else ()
    if not maps:
        return record
    smooth = around.passing({one.end.node: one.begin for one in maps})
    form = smooth.normal_form(steps[0], steps[-1] + 1, found)
    better = _named(smooth, found, form, steps, opaque)
    if better.method is None or _is_unnamed(better):
        return record
    told = ", ".join(dict.fromkeys(one.name for one in maps))
    kind = "forward-backward" if isinstance(better.method, GeneralLinearMethod) and better.method.n_fields == 1 else (
        "proximal")  # fmt: skip
    after = tuple(operation for one in maps for operation in one.operations)
    return replace(
        better, name=f"{better.name}, then {told} ({kind})", evidence="measured", after=after,
        notes=(*dict.fromkeys(one.note for one in maps), *better.notes), recorded=(None,) * len(better.recorded),
        system=f"{better.system}, and the subgradient of a convex function, by its proximal map",
    )  # fmt: skip


def _is_unnamed(record: Identification) -> bool:
    return record.name.startswith(("unnamed", "unknown"))


def _named(
    around: Surroundings, found: Slots, form: NormalForm, steps: tuple[int, ...], opaque: Sequence[str]
) -> Identification:
    """The record of a normal form of several states."""
    start, stop = steps[0], steps[-1] + 1
    diagonal = any(c.kind == "diagonal" for terms in form.forms for c in terms.values())
    table = blocks(form, found.contexts, one_coordinate=diagonal)
    if table is None or (opaque and not form.merges):
        hidden = f"hidden in {', '.join(opaque)}" if opaque else "the states are mixed or moved"
        unread = _nothing(steps, "unknown", f"the state is a tuple of tensors; {hidden}", "unknown")
        return unread if opaque else _laid_out_anew(form, found, steps) or unread
    coefficients = [c for terms in form.forms for c in terms.values()]
    gated = any(c.kind == "gate" for c in coefficients)
    symmetric = is_symmetric(form) if not gated and len(form.stages) == 2 else None
    certified = all(c.kind in ("scalar", "dropout") and not c.held for c in coefficients)
    pending = name_pending(table, form)
    drift = None
    if not (pending or gated):
        drift = without_increments(table, form, found.contexts, partial(around.scales_channels, form.piece))
    if drift is not None:
        named, certified, diagonal = name_several_states(drift, symmetric=None, gated=False), False, False
        table, named = (drift, with_increments(named)) if named.is_known else (table, named)
    else:
        named = pending or name_several_states(table, symmetric=symmetric, gated=gated)
    if not named.is_known and drift is None and (read := table.without_unread()) is not table:
        table, named = read, name_several_states(read, symmetric=None, gated=gated)
    if named.name == MEMORY_CELL and not is_memory_cell(form):
        named = UNNAMED_PAIR
    readout, composed = None, None if named.is_known or drift is not None else with_composite_fields(table)
    if composed is not None:
        table, named = composed, name_several_states(composed, symmetric=None, gated=gated)
    if not named.is_known and not gated and drift is None:
        known = name_composition(table) or name_splitting(table, adjoint=are_adjoint(form))
        named = known or alternating_affine(table) or named
    if not named.is_known and not gated and drift is None:
        readout = with_readout(table)
        named = readout.name if readout is not None else _in_parts(around, found, steps) or named
    if named.name == LEAPFROG and len(table.rows) == 1 and not _is_evaluated_beside(around, form, steps):
        named = replace(named, name=LEAPFROG_OR, system=_EITHER)
    if named.order == 2 and direction(shears(table) or ()) < 0:
        named = replace(named, h=-named.h)
    unit = named.unit
    if diagonal:
        mean = blocks(form, found.contexts)
        other = named if mean is None else name_several_states(mean, symmetric=symmetric, gated=gated)
        named = told_by_entry(named, other, [c for c in coefficients if c.kind == "diagonal"])
    method = table.method(unit)
    method.name = named.name
    checks: tuple[Check, ...] = ()
    if around.checks and (named.name == HAMILTONIAN or named.name.startswith("reversible")):
        measured = volume(around.flow, start, stop)
        checks = (measured,) if measured is not None else ()
    # that a field is a gradient was seen in its Jacobian at this input; that the step is reversible is in the graph
    certified = certified and named.name != HAMILTONIAN
    record = Identification(
        name=named.name,
        method=method,
        skip=None,
        step_size=None if named.convention.startswith(OWN_SIZES) else named.h,
        convention=named.convention,
        evidence="proven" if certified and named.is_known else "measured",
        residual=max((c.residual for c in coefficients), default=0.0),
        steps=steps,
        notes=(*([] if pending is None else [told_of(len(form.sources))]), *_notes(around, form, table, found)),
        system=named.system,
        shared_weights=table.weights_shared,
        checks=checks,
        recorded=table.recorded_with(unit),
    )
    if readout is not None and record.evidence == "proven":  # outputs may be other entries of what the fields give out
        old, new = form.sources[readout.source], form.targets[readout.target]
        own = readout.table
        alone = replace(record, method=own.method(named.unit), recorded=own.recorded_with(named.unit))
        sure = confirmed(alone, around.piece(form.piece.nodes, [old], [new], found.contexts))
        record = replace(sure, method=record.method, recorded=record.recorded)
    else:
        record = confirmed(record, form.piece)
    return with_noise(record, [form])


def _laid_out_anew(form: NormalForm, found: Slots, steps: tuple[int, ...]) -> Identification | None:
    """The record of couplings of streams whose entries are moved besides, by each of them (squeezed: i-RevNet).

    A move is undone by another one, so that a coupling stays reversible; of other methods it makes something else.
    """
    table = blocks(form, found.contexts, moves_cancel=True)
    named = None if table is None or len(table.V) != 2 else name_several_states(table, symmetric=None, gated=False)
    if named is None or not named.name.startswith((ADDITIVE_COUPLING, REVERSIBLE)):
        return None
    shapes = ["x".join(map(str, meta_of(ends[0]).shape)) for ends in (form.sources, form.targets)]
    why = f"the entries of the streams are moved besides, {shapes[0]} to {shapes[1]}: a map that another one undoes"
    record = _nothing(steps, f"{named.name}, entries moved", why, "measured")
    count = f"{len(form.sources)} states{PARTS * found.split}"
    return replace(record, system=named.system, notes=(*record.notes, count))


def _is_evaluated_beside(around: Surroundings, form: NormalForm, steps: tuple[int, ...]) -> bool:
    """Whether the field of a step is that of the step before or behind it, so that it is one and no two in turn."""
    return _is_beside(around, form.stages[0].nodes, steps)


def _is_beside(around: Surroundings, nodes: Sequence[Node], steps: tuple[int, ...]) -> bool:
    own = parameters_of(nodes, around.names)
    near = [i for i in (steps[0] - 1, steps[-1] + 1) if 0 <= i < len(around.flow.steps)]
    beside = [set(parameters_of(around.nodes(i, i + 1), around.names)) for i in near]
    return not own or any(beside_one.issuperset(own) for beside_one in beside)


def _in_parts(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Name | None:
    """The name of a step that is several steps one after the other."""

    def name_of(table: Blocks) -> Name:
        return name_several_states(table, symmetric=None, gated=False)

    def form_of(nodes: Sequence[Node], old: Sequence[Value], new: Sequence[Value]) -> NormalForm:
        return around.form_of(around.piece(nodes, old, new, found.contexts))

    return composed_name(around.whole(steps[0], steps[-1] + 1, found), name_of, form_of)


def _paired(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Slots:
    """Parts of one tensor, made at once, in the order of the states that carry them on."""
    piece = around.whole(steps[0], steps[-1] + 1, found)
    if any(target in found.sources for target in found.targets):
        nodes = around.nodes(steps[0], steps[-1] + 1)
        together = [joined(around.graph, nodes, v) for v in around.flow.states[steps[-1] + 1].values]
        one = any(parts is not None and tuple(parts) == tuple(found.targets) for parts in together)
        if one and parameters_of(piece.nodes, around.names) and _is_beside(around, piece.nodes, steps):
            return found  # one tensor, and one field in every step: the newer part becomes the older
        carried = [[v for v in piece.expand(target)[0] if v in found.sources] for target in found.targets]
        followed = [sources[0] for sources in carried if len(sources) == 1]
    else:
        followed = _followed(piece, found)
    if set(followed) != set(found.sources) or len(followed) != len(found.targets):
        return found
    return replace(found, targets=tuple(found.targets[followed.index(v)] for v in found.sources))


def _followed(piece: Piece, found: Slots) -> list[Value]:
    """The old state that each new one follows, told where one is left; what shifts up in a history follows none."""
    left = [{v for v in piece.expand(target)[0] if v in found.sources} for target in found.targets]
    places: dict[int, Value] = {}
    while (place := next((i for i, on in enumerate(left) if i not in places and len(on) == 1), None)) is not None:
        (places[place],) = left[place]
        left = [on if i in places else on - {places[place]} for i, on in enumerate(left)]
    return [places[i] for i in sorted(places)]


def _notes(around: Surroundings, form: NormalForm, table: Blocks, found: Slots) -> tuple[str, ...]:
    notes = [f"{len(form.sources)} states" + (PARTS if found.split else "")]
    if found.contexts:
        notes.append(f"{len(found.contexts)} tensor(s) from before are held fixed")
    if any(c.kind == "diagonal" for terms in form.forms for c in terms.values()):
        notes.append("every entry has numbers of its own: the tableau is that of the first")
    learned = around.learned_factors(form.piece)
    if learned:
        notes.append(f"factors that are parameters: {', '.join(learned)}")
    held = max((c.held for terms in form.forms for c in terms.values()), default=0.0)
    notes += masked(set(), held)
    for i, (terms, source) in enumerate(zip(form.forms, form.sources, strict=True), 1):
        if (kept := terms.get(source)) is not None and kept.kind == "gate":
            told = f"the old x_{i} is multiplied by {kept.low:.3g} to {kept.high:.3g} in the new one"
            notes.append(f"{told} here, held fixed in M(z)")
    return tuple(notes)


def _change_of_count(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification:
    """Where a method with several states, a branch or a long skip begins or ends; and layers that keep everything."""
    before, after = len(found.sources), len(found.targets)
    kept = [v for v in found.targets if v in found.sources]
    if len(kept) == before and after == before + 1 and _reads_joined(around, found, steps):
        return _dense(found, steps)
    if after < before:
        why = f"{before} states become {after}: the end of a method with several states, of a branch or of a long skip"
        return _nothing(steps, "join", why, "proven")
    why = f"{before} state(s) become {after}: the start of a method with several states, of a branch or of a long skip"
    return _nothing(steps, "fork", why, "proven")


def _reads_joined(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> bool:
    """Whether several old states are all read side by side, as one."""
    graph = around.graph
    nodes = around.nodes(steps[0], steps[-1] + 1)
    readers = {operation(node) for node in nodes for v in found.sources if v in graph.inputs[node]}
    return len(found.sources) > 1 and readers <= JOINS


def _dense(found: Slots, steps: tuple[int, ...]) -> Identification:
    """DenseNet: in the padded space J = I + (a strictly lower triangular part), so that all eigenvalues are 1."""
    count = len(found.sources)
    zeros = [[0.0] * count]
    method = GeneralLinearMethod(
        [[0.0] * count for _ in range(count)],
        [[float(i == j) for j in range(count + 1)] for i in range(count)],
        [*zeros * count, [1.0] * count],
        [[float(i == j) for j in range(count + 1)] for i in range(count + 1)],
        fields=range(count),
        name="dense (concatenation)",
    )
    return Identification(
        name="dense (concatenation)",
        method=method,
        skip=None,
        step_size=1.0,
        convention="h = 1: only the product h f can be seen",
        evidence="proven",
        residual=0.0,
        steps=steps,
        notes=("the state is kept whole beside a function of it: every eigenvalue of the padded step is 1",),
        system="none: nothing that is there is changed",
    )


def dense_concatenation(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification | None:
    """The record of a step s' = [s; H(s)] whose state is one tensor, or of several, [s; H_1(s); H_2(s, H_1); ...]."""
    graph, nodes = around.graph, around.nodes(steps[0], steps[-1] + 1)
    parts = joined(graph, nodes, found.targets[0])
    if parts is None or len(parts) < 2 or found.sources[0] not in parts:
        return None
    made = {found.sources[0]}
    for node in nodes:
        if not made.isdisjoint(graph.inputs[node]):
            made.update(outputs_of(node))
    if not made.issuperset(parts):
        return None  # what is held fixed is put beside the state: a part of a step
    if len(parts) == 2:
        return _dense(found, steps)
    if any(not _reads(around, nodes, parts[:i], part) for i, part in enumerate(parts) if part != found.sources[0]):
        return None
    count = len(parts) - 1
    why = f"the state is kept whole and {count} layers add to it, each reading all before: every eigenvalue is 1"
    return replace(_nothing(steps, f"dense (concatenation, {count} layers)", why, "proven"),
                   system="none: nothing that is there is changed")  # fmt: skip


def _reads(around: Surroundings, nodes: Sequence[Node], before: Sequence[Value], part: Value) -> bool:
    """Whether a part of a concatenation is made of all parts before it."""
    piece = around.piece(nodes, before, [part])
    return set(before) <= {v for node in piece.nodes for v in piece.inputs(node)}


def _nothing(steps: tuple[int, ...], name: str, why: str, evidence: str) -> Identification:
    return Identification(name, None, None, None, "none", evidence, None, steps, (), (why,), "none")
