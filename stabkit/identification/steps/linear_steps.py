"""Records of steps in which linear operators act on the state: semi-implicit, exponential, and split ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stabkit.identification.form.chain import Link, joined
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.linear_parts import (
    BACKWARD_EULER,
    LINEAR_SKIP,
    LinearParts,
    linear_reading,
    operator_of,
)
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.identification.form.tableau import blocks
from stabkit.identification.names.sequences import RESTART
from stabkit.identification.names.single import CLOSE, name_one_state
from stabkit.identification.record import Identification, nothing
from stabkit.identification.steps.around_addition import normalises
from stabkit.identification.steps.driven_solves import driven_solve
from stabkit.identification.steps.streams import mixed_streams
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors
from stabkit.vocabulary import moves

_RESTARTS = "a linear map of the state and a state that is held fixed: nothing else depends on the state"
_CLOSE = 1e-12
_TAKES = moves("select")
_SAME = 2048.0  # rounding units between products with one operator, as of products with a few matrices


def read_linear(
    around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]
) -> Identification | None:
    """The record of a step in which linear operators act on the state; None where none do, or norms do as well."""
    start, stop = steps[0], steps[-1] + 1
    if all(link.kind in ("sum", "scaling") for link in links):
        return None
    if any(normalises(link) for link in links if link.kind == "weightless"):
        return None
    whole = around.whole(start, stop, found)
    driven = driven_solve(whole, steps)
    if driven is not None:
        return driven
    parts = LinearParts(whole)
    affine = bool(parts.joins) and not parts.has_field  # nothing is added but what the input makes
    merges = [link for link in links if link.kind == "sum"]
    evaluated = [[stage.key for stage in link.form.stages] for link in merges]
    several = any(len(set(keys)) < len(keys) for keys in evaluated)  # a method of its own before the linear part
    if not affine and (len(merges) > 1 or several or (merges and links.index(merges[0]) > 0)):
        split = _splitting(around, links, steps)
        if split is not None:
            return split
    if len(merges) > 1:
        return None
    source, target = (_layout(around, i, v[0]) for i, v in ((start, found.sources), (stop, found.targets)))
    at_once = [link.kind for link in links if link.kind != "scaling"] == ["map"] or (affine and _is_driven(whole))
    reading = linear_reading(whole, source, target, at_once=at_once)
    if reading is None or (reading.name == LINEAR_SKIP and mixed_streams(whole) is not None):
        return None
    return Identification(
        name=reading.name,
        method=None,
        skip=None,
        step_size=reading.h,
        convention=reading.convention,
        evidence=reading.evidence,
        residual=reading.residual,
        steps=steps,
        notes=reading.notes,
        system=reading.system,
    )


def _is_driven(piece: Piece) -> bool:
    """Whether what is held fixed is one of a sequence: the input of a time step, and not the same for all steps."""
    return any(operation(v.node) in _TAKES for v in piece.contexts) or any(operation(n) in _TAKES for n in piece.nodes)


def _layout(around: Surroundings, index: int, value: Value) -> Layout:
    """How the entries of a value of a state belong to samples; all to one where the value is a part of another."""
    state = around.flow.states[index]
    if value in state.values:
        return state.layouts[state.values.index(value)]
    same = [layout for v, layout in zip(state.values, state.layouts, strict=True) if meta_of(v) == meta_of(value)]
    return same[0] if same else Layout(1, None)


def _splitting(around: Surroundings, links: Sequence[Link], steps: tuple[int, ...]) -> Identification | None:
    """Euler steps and linear operators one after the other."""
    parts: list[str] = []
    sizes: list[float] = []
    solves = operators = 0
    proven = True
    residual = 0.0
    waiting: list[Link] = []
    acts: list[object] = []  # what tells parts apart: the field, or what an operator makes of a random cotangent
    for link in [*links, None]:
        if link is not None and link.kind != "sum":
            waiting.append(link)
            continue
        if waiting:
            piece = joined(around.graph, waiting)
            kind = operator_of(piece, _layout(around, steps[0], piece.sources[0]),
                               _layout(around, steps[-1] + 1, piece.targets[0]))  # fmt: skip
            if kind is None:
                return None
            if kind != "number":
                solves, operators = solves + (kind == BACKWARD_EULER), operators + 1
                parts.append(kind)
                acts.append(_action(piece))
            waiting = []
        if link is None:
            break
        table = blocks(link.form)
        named = None if table is None else name_one_state(table)
        if named is None or not named.is_known or not len(table.rows if table else ()):
            return None
        gated = any(c.kind == "gate" for a, c in link.form.forms[0].items() if a in link.form.sources)
        parts.append("gated Euler" if gated else named.name.replace("forward Euler", "Euler"))
        sizes.append(named.h)
        acts.append((named.h, [stage.key for stage in link.form.stages]))
        coefficients = link.form.forms[0].values()
        proven = proven and all(c.kind == "scalar" for c in coefficients)
        residual = max([residual, *(c.residual for c in coefficients)])
    if not operators or not sizes:
        return None
    same = max(sizes) - min(sizes) <= _CLOSE * max(sizes)
    notes = [f"{len(parts)} steps one after the other, each of a part of the field: a splitting"]
    strang = len(parts) % 2 == 1 and len(parts) > 1 and all(map(_alike, acts, reversed(acts)))
    if solves:
        notes.append("the linear system M x' = x is a backward Euler step with M = 1 + h A; h A is not taken apart")
    if not same:
        notes.append(f"step sizes of the additions: {', '.join(f'{h:.3g}' for h in sizes)}")
    return Identification(
        name=f"{'Strang-ordered' if strang else 'Lie'} splitting ({', '.join(parts)})",
        method=None,
        skip=None,
        step_size=sizes[0] if same else None,
        convention="h: the number that multiplies the branches" if same else "none: the steps are of different sizes",
        evidence="proven" if proven else "measured",
        residual=residual,
        steps=steps,
        notes=tuple(notes),
        system="x' = f_1(x) + f_2(x) + ..., one of them linear",
    )


def _action(piece: Piece) -> Tensor:
    """What an affine piece makes of a random cotangent."""
    w = random_tensors([piece.targets[0]], seed=0)[0]
    return LinearParts(piece).pulled(w)[piece.sources[0]].reshape(-1)


def _alike(a: object, b: object) -> bool:
    """Whether two parts of a splitting are one field with one step size, or one operator."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        near = _SAME * torch.finfo(a.dtype).eps * float(a.norm())
        return a.shape == b.shape and float((a - b).norm()) <= near
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def restarted(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification | None:
    """The record of a step P x + b x_0, where P is linear and x_0 an earlier state that is held; None for others.

    What is added does not depend on the state, so that there is no field beside P, and no skip to begin behind it.
    """
    if not found.contexts:
        return None
    form = around.normal_form(steps[0], steps[-1] + 1, found)
    terms, inputs = form.forms[0], [terms for stage in form.stages for terms in stage.inputs]
    held = [atom for atom in terms if atom in found.contexts]
    moved = [stage for stage in form.stages if stage.output in terms]
    if len(held) != 1 or not moved or len(terms) != len(held) + len(moved) or terms[held[0]].kind != "scalar":
        return None
    whole = around.whole(steps[0], steps[-1] + 1, found)
    affine = all(stage.is_affine and not stage.opaque for stage in form.stages)
    if not affine or _is_driven(whole) or any(atom in found.contexts for terms in inputs for atom in terms):
        return None
    b, seen = terms[held[0]].value, {v for state in around.flow.states[: steps[0] + 1] for v in state.values}
    if held[0] not in seen or meta_of(held[0]).shape != meta_of(found.targets[0]).shape:
        return None
    record = nothing(
        steps, f"{RESTART} (P x {'-' if b < 0 else '+'} {abs(b):.3g} x_0)", _RESTARTS, "proven",
        system="x' = P x - x + b x_0, Euler with h = 1; at rest x = P x + b x_0",
    )  # fmt: skip
    return replace(record, residual=terms[held[0]].residual)


def with_first_restarts(records: Sequence[Identification], around: Surroundings) -> list[Identification]:
    """Records, that of the step which begins at the state that the next ones hold as what these do: there x is x_0.

    Args:
        records: the readings of consecutive steps.
        around: the flow.
    """
    found = list(records)
    for i, (record, behind) in enumerate(itertools.pairwise(records)):
        if not behind.name.startswith(f"{RESTART} (P x") or record.skip is None or record.name == behind.name:
            continue
        ours, theirs = (around.slots(one.steps[0], one.steps[-1] + 1) for one in (record, behind))
        form = around.normal_form(record.steps[0], record.steps[-1] + 1, ours)
        terms, held = form.forms[0], around.normal_form(behind.steps[0], behind.steps[-1] + 1, theirs).forms[0]
        x = ours.sources[0]
        same = x in terms and x in held and abs(terms[x].value - held[x].value) <= CLOSE
        if len(ours.sources) == 1 and same and all(stage.is_affine for stage in form.stages):
            why = "the first step of its kind: the state is the one that the next ones hold"
            found[i] = replace(behind, steps=record.steps, notes=(why, *behind.notes), over_time=record.over_time)
    return found
