"""Records of steps in which linear operators act on the state: semi-implicit, exponential, and split ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stabkit.identification.form.chain import Link
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
from stabkit.identification.names.single import name_one_state
from stabkit.identification.record import Identification
from stabkit.identification.steps.around_addition import normalises
from stabkit.identification.steps.driven_solves import driven_solve
from stabkit.identification.steps.streams import mixed_streams
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors
from stabkit.vocabulary import moves

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
            piece = _joined(around, waiting)
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


def _joined(around: Surroundings, links: Sequence[Link]) -> Piece:
    """Several links as one piece."""
    nodes = {node for link in links for node in link.form.piece.nodes}
    ordered = [node for node in around.graph.nodes if node in nodes]
    return Piece(around.graph, ordered, links[0].form.sources, links[-1].form.targets)
