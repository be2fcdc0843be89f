"""Skips that pass norms inside a step: no linear path shows them, and yet the step is no map without a skip.

Two branches may be added to the state and normed each by itself before they are added, x' = a P(x + f(x)) +
b P(x + g(x)); the norms may stand between additions of another kind. Whether a skip leads around a step is therefore
measured before it is denied: a cotangent is pulled back along everything that has no weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.autograd.graph import Node

from stabkit.identification.form.chain import Link
from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.hidden_skip import HiddenSkip, hidden_skip
from stabkit.identification.form.normal_form import Stage
from stabkit.identification.form.operations import MOVES, has_matrix, is_affine
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import name_one_state
from stabkit.identification.record import Identification, nothing, record_of
from stabkit.identification.steps.around_addition import normalises, normalises_in
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, random_tensors

_NUMBERS = frozenset({"scalar", "diagonal"})


def way_past_weights(piece: Piece) -> tuple[str, ...] | None:
    """The operations that are not affine on the way of the one source to the one target past all weights.

    Returns:
        None where nothing of a cotangent arrives that way: then no skip leads around the piece, whatever it passes.
    """
    source, target = piece.sources[0], piece.targets[0]
    reached: set[Value] = {source}
    allowed: dict[Node, list[Value]] = {}
    for node in piece.nodes:
        taken = [v for v in piece.inputs(node) if v in reached]
        if taken and _passes(piece, node, taken):
            allowed[node] = taken
            reached.update(outputs_of(node))
    if target not in reached:
        return None
    arrived = pull(piece.graph, list(allowed), allowed, {target: random_tensors([target], seed=0)[0]}).get(source)
    if arrived is None or not bool(arrived.any()):
        return None
    bent = [n for n, taken in allowed.items() if not is_affine(n, len(taken)) or piece.is_norm(Value(n, 0))]
    return tuple(dict.fromkeys(operation(n) for n in bent))


def _passes(piece: Piece, node: Node, taken: Sequence[Value]) -> bool:
    """Whether an operation hands a state on, bent or scaled at most: it has no matrix, and makes no fewer entries."""
    if has_matrix(node) or piece.hides(node) or node in piece.owned:
        return False
    if operation(node) in MOVES:
        return True
    return all(meta_of(v).numel == meta_of(Value(node, 0)).numel for v in taken)


def skip_past_norms(piece: Piece, links: Sequence[Link], steps: tuple[int, ...]) -> Identification | None:
    """The record of a step whose skip passes norms or activations inside; None where no skip leads around it."""
    scaled = hidden_skip(piece, of_entries=True)
    if scaled is not None:
        return measured_skip(scaled, steps)
    passed = way_past_weights(piece)
    if not passed:
        return None
    found = _parallel_projections(links, steps)
    if found is not None:
        return found
    why = f"the skip passes {', '.join(passed)} inside the step, where no single a describes it: no step from x"
    return nothing(steps, "transformed skip", why, "measured")


def _parallel_projections(links: Sequence[Link], steps: tuple[int, ...]) -> Identification | None:
    """Several branches that are added to the state, normed each by itself, and added with a weight each."""
    weights: list[Coefficient] = []
    fields: list[Coefficient] = []
    branches = sums = norms = 0
    after: tuple[str, ...] = ()
    for link, behind in zip(links, [*links[1:], None], strict=True):
        terms = link.form.forms[0]
        if link.kind == "map":
            stages = {s.output: s for s in link.form.stages}
            normed = [stages[a] for a in terms if a in stages]
            if len(terms) < 2 or len(normed) != len(terms) or not all(_is_normed_sum(link, s) for s in normed):
                return None
            weights += terms.values()
            fields += [c for s in normed for c in s.inputs[0].values()]
            branches, sums, norms = branches + len(normed), sums + len(normed), norms + len(normed)
        elif link.kind == "sum":
            if behind is None or behind.kind != "weightless" or not normalises(behind):
                return None
            sums += 1
        elif link.kind == "weightless" and normalises(link):
            norms, after = norms + 1, link.operations
        elif link.kind != "scaling":
            return None
    if not branches or not {c.kind for c in (*weights, *fields)} <= _NUMBERS:
        return None
    numbers = ", ".join(f"{c.value:.3g}" for c in weights)
    notes = (
        f"{branches} branches are added to the state and normed each by itself, then added with weights {numbers}",
        f"the skip passes {norms} norm(s) after {sums} addition(s), so no single a describes it",
    )
    evidence = "proven" if {c.kind for c in (*weights, *fields)} == {"scalar"} else "measured"
    return Identification(
        name="projected Euler (post-norm), parallel branches",
        method=None,
        skip=None,
        step_size=None,
        convention="none: what is normed has no size of its own",
        evidence=evidence,
        residual=max(c.residual for c in (*weights, *fields)),
        steps=steps,
        after=after,
        notes=notes,
        system="x' = f_1(x) + f_2(x) + ..., each retracted to the sphere, and their mean",
    )


def _is_normed_sum(link: Link, stage: Stage) -> bool:
    """Whether a stage does nothing but norm a sum of the old state and something else."""
    graph = link.form.piece.graph
    if not stage.is_weightless or len(stage.inputs) != 1 or not normalises_in(graph, stage.nodes):
        return False
    return link.form.sources[0] in stage.inputs[0] and len(stage.inputs[0]) > 1


def measured_skip(hidden: HiddenSkip, steps: tuple[int, ...]) -> Identification:
    """The record of a skip that was measured: all else is one field."""
    table = Blocks.single(hidden.value)
    record = record_of(name_one_state(table), table, steps, skip=hidden.value, residual=hidden.residual)
    notes = [f"the skip was measured: it passes {', '.join(dict.fromkeys(hidden.operations))}"]
    if not hidden.is_one_number:
        name = f"diagonal skip (mean a = {hidden.value:.3g})"
        record = replace(record, name=name, system="x' = f(x) + (a - 1) x, a number for each entry")
        notes.insert(0, f"every entry has a number of its own on the skip, from {hidden.low:.3g} to {hidden.high:.3g}")
    return replace(record, evidence="measured", notes=(*notes, "all else is taken as one field"))


def with_fixed_norms(piece: Piece, record: Identification) -> Identification | None:
    """The record of sums that are followed by norms whose statistics are fixed: factors, and no projection.

    Returns:
        None where a norm behind the sums takes its statistics from the state, as all but batch norms in evaluation do.
    """
    scaled = hidden_skip(piece, of_entries=True)
    if scaled is None:
        return None
    why = f"the statistics of the norm are fixed (evaluation): {', '.join(record.after)} is affine here, no projection"
    found = measured_skip(scaled, record.steps)
    return replace(found, after=record.after, notes=(*found.notes, why))
