"""One method read off the graph: the states, the tableau, what happens around it, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stabkit.identification.evidence.confirmation import checks_of
from stabkit.identification.evidence.for_every_input import holding
from stabkit.identification.evidence.reproduction import confirmed
from stabkit.identification.fields.composites import as_one_field, with_composite_fields
from stabkit.identification.fields.field_values import chains_of_other_fields
from stabkit.identification.form.chain import Link
from stabkit.identification.form.coefficients import Coefficient, LinearCombination
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.grouping import is_part_of_round, is_repeated
from stabkit.identification.form.hidden_skip import hidden_skip, reaches_linearly, residuals_inside
from stabkit.identification.form.linear_parts import LINEAR_SKIP
from stabkit.identification.form.skip_past_norms import measured_skip, skip_past_norms, with_fixed_norms
from stabkit.identification.form.slots import Slots, beside_outputs
from stabkit.identification.form.stores import without_stores
from stabkit.identification.form.tableau import Blocks, blocks
from stabkit.identification.names.sequences import name_sequence, says_less
from stabkit.identification.names.single import (
    NO_STEP,
    NO_TABLEAU,
    Name,
    by_numbers,
    has_two_stages,
    name_one_state,
)
from stabkit.identification.names.weighed import gates_of_stages, name_weighed
from stabkit.identification.record import Identification, nothing, record_of
from stabkit.identification.steps.additions import depends_on_input, last_sum, linear_links, notes_of_sums, without_mean
from stabkit.identification.steps.around_addition import (
    begins_as_it_ends,
    box_behind,
    masked,
    normalised_at_the_end,
    normalises,
    norms_after,
    scaled_by_entries,
    with_gates,
    with_projection,
    with_randomness,
)
from stabkit.identification.steps.branch_numbers import with_numbers_told
from stabkit.identification.steps.change_of_space import change_of_space, linear_map_as_skip
from stabkit.identification.steps.coupled import coupled
from stabkit.identification.steps.couplings import mixed_coupling, scaled_coordinates, with_couplings
from stabkit.identification.steps.diffusion import as_diffusion
from stabkit.identification.steps.exponential_steps import by_coordinates
from stabkit.identification.steps.forks_and_joins import holds_a_step, made_beside, step_inside
from stabkit.identification.steps.growing_history import growing_history
from stabkit.identification.steps.held_entries import skip_of_some, told_of_mask, without_held_entries
from stabkit.identification.steps.implicit import (
    begins_at_constants,
    fixed_point,
    inner_iterations,
    iterates_silently,
    linear_solve,
    record_of_solve,
    silent_rounds,
    solves_inside,
)
from stabkit.identification.steps.iterated_solves import (
    held_iteration,
    record_of_equation,
    solved_step,
    solves_in_fields,
)
from stabkit.identification.steps.linear_steps import read_linear, restarted
from stabkit.identification.steps.moves_behind import before_moves
from stabkit.identification.steps.nested import HELD, INSIDE, MAP, in_turn, with_nested_chains
from stabkit.identification.steps.noise import with_noise
from stabkit.identification.steps.own_numbers import states_in_fields, without_own_numbers
from stabkit.identification.steps.pairs import dense_concatenation, read_several_states
from stabkit.identification.steps.predicted_steps import (
    with_fed_step,
    with_predicted_step,
    with_sizes_of_input,
    with_step_sizes_held,
    without_clock,
)
from stabkit.identification.steps.proximal import learned_threshold, soft_threshold, with_clamps_taken_off
from stabkit.identification.steps.relaxation import with_linear_part
from stabkit.identification.steps.retraction import bent_skip, retraction
from stabkit.identification.steps.sliding_window import sliding_window, window_of_states
from stabkit.identification.steps.solver_outputs import last_of_stack, with_others
from stabkit.identification.steps.state_mixing import (
    beside_identity,
    mixed_by_itself,
    record_of_mixing,
    streams_mixed_by_themselves,
)
from stabkit.identification.steps.streams import mixed_by_numbers, mixed_streams, record_of_streams, streams_in_turn
from stabkit.tracing.graph.values import meta_of, operation

_ITERATED = 3  # uses of one field in a row that make a loop of a map without a skip


def read(around: Surroundings, start: int, stop: int) -> Identification:
    """The method between two states of a flow."""
    if is_part_of_round(around.flow, start, stop, around.loops):
        why = "a loop repeats these operations together with others, and they begin or end between its stages"
        return nothing(tuple(range(start, stop)), "part of a step", why, "unknown")
    history = growing_history(around, start, stop)
    if history is not None:
        return history
    found = beside_outputs(around.flow, start, stop) or around.slots(start, stop)
    if (beside := made_beside(around, found, start, stop)) is not None:
        return beside
    return _with_doubts(around, found, _read(around, found, start, stop))


def read_states(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification:
    """The method that leads from some values within a flow to others, which may lie inside of its steps."""
    return _with_doubts(around, found, _of_slots(around, found, steps))


def _with_doubts(around: Surroundings, found: Slots, record: Identification) -> Identification:
    """A record with less sure evidence where the graph holds this input's path alone, or less than the values."""
    start, stop = record.steps[0], record.steps[-1] + 1
    shifts = record.name == LINEAR_SKIP or (record.skip or 0.0) not in (0.0, 1.0)
    if shifts and begins_at_constants(around.flow, start, stop):
        why = "a solver begins at a constant here: what the steps start from is an input of its field, and no state"
        return nothing(record.steps, "unknown", why, "unknown")
    if record.evidence != "proven" or not (_claims_numbers(record) or holds_a_step(record)):
        return record
    return holding(around, record, found, lambda other: _read(other, other.slots(start, stop), start, stop))


def _claims_numbers(record: Identification) -> bool:
    """Whether a record says by which numbers states and fields are combined."""
    return record.method is not None or record.skip is not None or record.step_size is not None


def _read(around: Surroundings, found: Slots, start: int, stop: int) -> Identification:
    steps = tuple(range(start, stop))
    if solves_inside(around.flow, start, stop):
        return _implicit(around, steps)
    if iterates_silently(around.flow, start, stop) and fixed_point(around.flow) is not None:
        return _implicit(around, steps)
    if not found.sources or not found.targets:
        return nothing(steps, "unknown", "which of the values around this step are its states was not found", "unknown")
    return _of_slots(around, found, steps)


def _of_slots(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification:
    """The method between some old states and some new ones."""
    start, stop = steps[0], steps[-1] + 1
    found = without_stores(around.graph, around.nodes(start, stop), found) or found
    if len(found.sources) == len(found.targets) == 1:
        return _one_state(around, found, steps)
    if (timed := without_clock(around, found, steps)) is not None:
        return with_sizes_of_input(_of_slots(*timed[:2], steps), by_norm=timed[2])
    record = read_several_states(around, found, steps)
    if record.name in ("fork", "join"):
        return step_inside(around, found, steps, record, _of_slots)
    if record.name in ("unnamed", "unknown") and (moved := without_held_entries(around, found)) is not None:
        other = read_several_states(around, moved, steps)
        if other.name not in ("unnamed", "unknown"):
            return told_of_mask(other)
    if record.name in ("unnamed", "unknown") and (window := window_of_states(around, found, steps)) is not None:
        return window
    before, after = (around.flow.states[i].values for i in (start, stop))
    if record.name.startswith("unnamed") and found.split and len(before) == len(after) == 1:
        whole = around.whole(start, stop, replace(found, sources=before, targets=after, split=False))
        flow = scaled_coordinates(whole, steps)
        if flow is not None:
            return flow
        streams = mixed_streams(whole) if record.name == "unnamed" else None
        if streams is not None:  # split off and mixed again
            return record_of_streams(streams, steps)
    return mixed_by_numbers(coupled(around, found, steps, record, _one_state))


def _implicit(around: Surroundings, steps: tuple[int, ...]) -> Identification:
    """A layer that solves for its output."""
    found = fixed_point(around.flow)
    if found is None:
        return nothing(steps, "unknown", silent_rounds(around.flow, steps[0], steps[-1] + 1), "unknown")
    record = nothing(
        steps,
        "implicit (fixed point)",
        f"{found}; what the graph holds is the last call alone",
        "measured",
        system="0 = f(z, x) - z: the equilibrium of z' = f(z, x) - z",
    )
    return replace(record, residual=found.residual)


def _one_state(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification:
    start, stop = steps[0], steps[-1] + 1
    links = with_clamps_taken_off(around.chain(start, stop, found))
    opaque = sorted({operation(n) for link in links for n in link.form.piece.nodes if link.form.piece.hides(n)})
    if meta_of(found.sources[0]).shape != meta_of(found.targets[0]).shape:
        dense = dense_concatenation(around, found, steps)
        if dense is not None:
            return dense
        last = last_of_stack(around.graph, found)
        if last and (inside := with_others(_one_state(around, replace(found, targets=(last,)), steps))):
            return inside
        return _with_inner(around, found, nothing(steps, "transition", change_of_space(links, opaque), "proven"))
    sums = [link for link in links if link.kind == "sum"]
    maps = [link for link in links if link.kind in ("map", "join")]
    if opaque and (maps or not sums):
        return nothing(steps, "unknown", f"a skip may hide inside {', '.join(opaque)}", "unknown")
    whole = around.whole(start, stop, found)
    window = sliding_window(around, whole, steps)
    if window is not None:
        return window
    linear = restarted(around, found, steps) or read_linear(around, found, links, steps)
    if linear is not None:
        return linear
    equation = solved_step(whole, around.names)
    if equation is not None:
        return record_of_equation(equation, steps)
    solved = linear_solve(whole)
    if solved is not None and not solves_in_fields(whole, around.names):
        return record_of_solve(solved, steps)
    if inner_iterations(whole, around.names) > 1:
        why = "an iterative solver runs inside: quotients of inner products scale directions, and are no gates"
        return nothing(steps, "iterative solver inside", why, "unknown")
    if maps:
        return _with_inner(around, found, _without_skip(around, found, links, steps))
    if not sums:
        return _without_sum(around, found, links, steps)
    first = links.index(sums[0])
    before = [n for link in links[:first] if link.kind == "weightless" for n in link.operations]
    norms = [normalises(link) for link in links[:first] if link.kind == "weightless"]
    if norms and all(norms) and is_repeated(around.flow, start, stop):
        record = _sums(around, found, links, steps)
        why = "each of several like steps begins with a norm of the state: it puts the step before on the sphere"
        return replace(record, name="projected Euler (post-norm)", skip=None, notes=(why, *record.notes),
                       system=f"{record.system}, retracted to the sphere after each step")  # fmt: skip
    if before and not any(link.form.stages for link in sums):
        why = "a map of the state without weights, and a value that is held fixed is added to it"
        name = Name("plain", "none: a map without a skip", 1.0, "h = 1: the map itself")
        return record_of(name, None, steps, skip=0.0, residual=0.0, notes=(why,))
    if before:
        why = f"the skip begins after {', '.join(before)}: x' = P(x) + f(P(x)), which is no step from x"
        return nothing(steps, "transformed skip", why, "proven")
    return _sums(around, found, links, steps)


def _without_skip(around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]) -> Identification:
    """A map without a skip; or one whose skip is a linear map."""
    mixed = mixed_coupling(links, steps)
    if mixed is not None:
        return mixed
    whole = around.whole(steps[0], steps[-1] + 1, found)
    hidden = hidden_skip(whole)
    if hidden is not None:
        return measured_skip(hidden, steps)
    streams = mixed_streams(whole) or streams_in_turn(around.graph, links)
    if streams is not None:
        return record_of_streams(streams, steps)
    threshold = learned_threshold(around.flow, steps, links)
    if threshold is not None:
        return threshold
    iterated = held_iteration(around, found, steps)
    if iterated is not None:
        return iterated
    retracted = retraction(links, steps)
    if retracted is not None:
        return retracted
    mixing = mixed_by_itself(whole)
    if mixing is not None:
        return record_of_mixing(mixing, steps)
    if whole.may_hide_skip():
        why = "the state is multiplied by a factor that grows with it and has a constant in it: a skip may hide there"
        return nothing(steps, "unknown", why, "unknown")
    notes = []
    told = in_turn(links, found.contexts)
    if has_residual := any(not part.endswith((MAP, HELD)) for part in told.split(", then ")):
        notes.append(f"{INSIDE} ({told}), no skip leads around the whole step")
    if any(link.kind == "join" for link in links):
        notes.append("the state is put beside a function of it, and both are mixed: several projections, no skip")
    for link in links:
        bent = bent_skip(link)
        if bent is not None:
            bent_by = dict.fromkeys(operation(node) for node in bent.nodes)
            why = f"the skip passes {', '.join(bent_by)}, which is not linear: x' = P(x) + f(x) is no step from x"
            return nothing(steps, "transformed skip", why, "proven")
    linear_map = linear_map_as_skip(links, steps)
    if linear_map is not None:
        return linear_map
    past = skip_past_norms(whole, links, steps)
    form = around.normal_form(steps[0], steps[-1] + 1, found)
    table = None if depends_on_input(form) else blocks(form, found.contexts)
    if table is not None and len(table.rows) > 1 and not notes:
        named = name_one_state(table)
        if named.name != "plain" or past is None:
            record = record_of(named, table, steps, skip=0.0, residual=0.0, notes=tuple(notes))
            most = max(map(table.fields.count, table.fields))
            if named.name != "plain" or most < _ITERATED or not table.A.any():
                return record
            why = f"a loop begins inside at a constant and uses one field {most} times: its rounds are not taken apart"
            return replace(record, step_size=None, convention=NO_STEP, evidence="measured", notes=(why,))
    if past is not None:
        return past
    linear = has_residual and reaches_linearly(whole)
    if linear:
        notes[:1] = [f"{INSIDE}; no skip leads around the whole step but a linear map, x' = P x + f(x)"]
    name = Name("plain", "none: a map without a skip", 1.0, "h = 1: the map itself")
    record = record_of(name, None, steps, skip=0.0, residual=0.0, notes=tuple(notes))
    return replace(record, evidence="measured") if linear else record


def _with_inner(around: Surroundings, found: Slots, record: Identification) -> Identification:
    """A record of what is no step that says how many there are inside of it: bottlenecks of a part of the channels."""
    if record.name not in ("plain", "transition"):
        return record
    count = residuals_inside(around.whole(record.steps[0], record.steps[-1] + 1, found))
    why = f"{count} residual addition(s) on values inside, Euler steps of these: a finer depth shows them"
    return replace(record, notes=(*record.notes, why)) if count else record


def _without_sum(around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]) -> Identification:
    weightless = [n for link in links if link.kind == "weightless" for n in link.operations]
    if weightless:
        name = Name("plain", "none: a map without a skip", 1.0, "h = 1: the map itself")
        return record_of(name, None, steps, skip=0.0, residual=0.0)
    total = _total(around, found, steps)
    if total is None or total.kind in ("moved", "mixed", "part"):
        return nothing(steps, "not a step", "the state's entries are moved, and nothing is added", "measured")
    name = name_one_state(Blocks.without_field(total.value))
    record = replace(record_of(name, None, steps, skip=total.value, residual=total.residual), method=None)
    return record if total.kind == "scalar" else scaled_by_entries(record, total)


def _total(
    around: Surroundings, found: Slots, steps: tuple[int, ...], links: Sequence[Link] = ()
) -> Coefficient | None:
    """The skip as a whole: what of the old state reaches the new one along linear paths outside of fields."""
    owned = {node for link in links for node in link.form.piece.owned}
    piece = around.whole(steps[0], steps[-1] + 1, found, owned)
    target, source = found.targets[0], found.sources[0]
    return LinearCombination(piece, target).coefficient(source) if target in piece.carrying else None


def _sums(around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]) -> Identification:
    """A chain of sums; where it is no known method, that of fields which end later than where they stop to bend."""
    mixing = streams_mixed_by_themselves(around.whole(steps[0], steps[-1] + 1, found))
    record = read_sums(around, found, links, steps)
    if mixing is not None:
        total = _total(around, found, steps, links)
        whole = total is not None and total.kind == "scalar" and total.value == 1.0
        return beside_identity(record, mixing) if whole else record_of_mixing(mixing, steps)
    if norms_after(links) and (fixed := with_fixed_norms(around.whole(steps[0], steps[-1] + 1, found), record)):
        return fixed
    if not record.name.startswith("unnamed"):
        return record
    controlled = with_step_sizes_held(around, found, steps, read_sums)
    if controlled is not None:
        return controlled
    for other, why in chains_of_other_fields(around, found, links, steps):
        better = read_sums(around, found, other, steps)
        if not better.name.startswith("unnamed") and better.shared_weights:
            return replace(better, notes=(*why, *better.notes))
        if record.name == "unnamed" and better.name.startswith(NO_TABLEAU) and better.shared_weights:
            record = replace(better, notes=(*why, *better.notes))
    name, system = by_numbers(record.name, record.system, record.method)
    if record.shared_weights and name != record.name:
        return replace(record, name=name, system=system)
    nested = None if record.shared_weights else with_nested_chains(around, found, links, steps, read_sums)
    if nested is not None:
        return nested
    called = around.most_called(steps[0], steps[-1] + 1)
    if called is None or record.shared_weights:
        return record
    told = f"{called[0]} is called {called[1]} times in it: what steps of a method these calls are was not found"
    return replace(record, notes=(told, *record.notes))


def read_sums(around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]) -> Identification:
    """A chain of sums, with norms or activations after them."""
    sums = [link.form for link in links if link.kind == "sum"]
    first = next(i for i, link in enumerate(links) if link.kind == "sum")
    behind = [link for link in links[first:] if link.kind == "weightless"]
    after = tuple(n for link in behind for n in link.operations)
    if begins_as_it_ends(sums, behind):
        why = "each stage begins with the map that stands behind the addition: rounds of one map, which is no field"
        return nothing(steps, "unnamed", why, "unknown")
    total = None if after else _total(around, found, steps, links)
    if total is not None and total.kind in ("moved", "mixed"):
        before = before_moves(found, links, lambda slots: _of_slots(around, slots, steps))
        return before or nothing(steps, "not a step", "the skip moves or mixes coordinates", "measured")
    parts = linear_links(links)
    tables = [blocks(p.form, found.contexts, moves_cancel=total is not None or p.kind == "scaling") for p in parts]
    if any(table is None for table in tables):
        return skip_of_some(around, found, steps, total)
    found_tables = [(part.form, t) for part, t in zip(parts, tables, strict=True) if t is not None]
    (table, *others), means = without_own_numbers(around, found_tables)
    at_the_end = normalised_at_the_end(links)
    last = last_sum(parts, [table, *others]) if norms_after(links) and not at_the_end else None
    pairs = [(part.form, found) for part, found in zip(parts, (table, *others), strict=True)]
    for other in others:
        table = table.then(other)
    if total is not None and total.kind == "scalar":
        table.V[0, 0] = total.value
    own_rates: tuple[str, ...] = ()
    relaxed = with_linear_part(table)
    if relaxed is not None and name_one_state(relaxed[0]).name.startswith("unnamed"):
        relaxed = None  # a field with a linear part is believed where it makes a method, not where it fits alone
    if relaxed is not None:
        table = relaxed[0]
    composed = with_composite_fields(table) if last is None and table.shared and len(sums) == 1 else None
    gates = gates_of_stages(sums)
    if composed is None and last is None and len(sums) == 1 and not name_one_state(table).is_known:
        composed = as_one_field(states_in_fields(sums, table))
    if composed is not None and (gates or name_one_state(composed).is_known):
        table = composed
    named = as_diffusion(name_one_state(table if last is None else last), sums, table)
    if last is None and (at_the_end or not named.is_known or says_less(named, sums)):
        named = name_sequence(pairs) or named
    named = (name_weighed(table, gates) if gates and last is None else None) or named
    by_rates = by_coordinates(sums[0], found.contexts, named) if len(parts) == 1 and last is None else None
    if by_rates is not None:
        table, named, own_rates = by_rates
    skips = [form.forms[0][form.sources[0]] for form in sums if form.sources[0] in form.forms[0]]
    kinds = {c.kind for c in skips} if total is None else {total.kind}
    held = max((c.held for c in (*skips, *filter(None, [total]))), default=0.0)
    residual = total.residual if total is not None else max((c.residual for c in skips), default=0.0)
    record = record_of(named, table, steps, skip=float(table.V[0, 0]), residual=residual, after=after)
    told = named.is_known or has_two_stages(named.name, len(table.rows))
    proven = kinds <= {"scalar"} and told and not (means or held or any(map(depends_on_input, sums)))
    record = replace(
        record,
        evidence="proven" if proven else "measured",
        notes=(
            *own_rates,
            *masked(kinds, held),
            *_linear_part(relaxed),
            *notes_of_sums(around, sums, table),
            *record.notes,
        ),
        checks=checks_of(sums, table) if around.checks else (),
    )
    if not any(link.kind == "weightless" for link in links[:first]):
        record = confirmed(record, around.whole(steps[0], steps[-1] + 1, found))
    threshold = soft_threshold(around.flow, steps[-1] + 1, links[-1]) if behind else None
    record = with_projection(
        record, norms_after(links), len(sums), box=box_behind(behind), threshold=threshold,
        bends=not all(map(normalises, behind)), whole=at_the_end, skips=tuple(c.value for c in skips),
    )  # fmt: skip
    record = with_gates(with_numbers_told(record, sums), kinds, sums)
    flow = scaled_coordinates(around.whole(steps[0], steps[-1] + 1, found), steps) if "gate" in kinds else None
    if flow is not None:
        record = replace(flow, after=record.after, notes=(*flow.notes, *record.notes))
    record = with_couplings(record, sums)
    record = with_fed_step(with_predicted_step(without_mean(record) if means else record, sums), around, sums)
    return with_noise(with_randomness(record, sums), [link.form for link in links])


def _linear_part(relaxed: tuple[Blocks, float] | None) -> tuple[str, ...]:
    if relaxed is None:
        return ()
    return (f"the field is f(x) = g(x) - {relaxed[1]:.4g} x: its linear part was told from the inputs of the stages",)
