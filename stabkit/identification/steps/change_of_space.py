"""What leads from one space to another: projections, pooled or padded shortcuts, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from stabkit.identification.form.chain import Link, joined
from stabkit.identification.form.linear_parts import LINEAR_SKIP
from stabkit.identification.form.normal_form import NormalForm, Stage
from stabkit.identification.form.operations import ADDS, JOINS, MOVES
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.record import Identification, nothing
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of


def change_of_space(links: Sequence[Link], opaque: Sequence[str]) -> str:
    """What a step between two shapes does, in words."""
    form = max((link.form for link in links), key=lambda form: len(form.piece.nodes))
    terms = form.forms[0]
    of_state = [s for s in form.stages if all(inputs.keys() <= set(form.sources) for inputs in s.inputs)]
    affine = [s for s in of_state if s.is_affine and s.output in terms]
    parts = [terms[a] for a in form.sources if a in terms]
    if all(operation(node) in MOVES for link in links for node in link.form.piece.nodes):
        return _moved(joined(form.piece.graph, links))
    text = "the space changes, so this is no step of a method"
    if any(link.kind == "map" and link.form is not form for link in links):
        return f"{text}; hidden in {', '.join(opaque)}" if opaque else text  # what leads around one part is no shortcut
    if affine and not parts and len(terms) > len(affine):
        before = links[: [link.form for link in links].index(form)]
        if any(link.kind in ("sum", "join") for link in before):
            return text  # what leads around the rest is no shortcut
        bent = dict.fromkeys(name for link in before if link.kind == "weightless" for name in link.operations)
        way = f"passes {', '.join(bent)} and then" if bent else "is"
        return f"{text}; the shortcut {way} a projection, a linear map"
    if parts and len(terms) > len(parts):
        if parts[0].kind == "part":
            takes = all(_takes_entries(form, a) for a in form.sources if a in terms)
            kind = "takes or pads entries of the state (option A)" if takes else "is a combination of its entries"
        else:
            kind = "moves entries" if parts[0].kind == "moved" else "passes the state on"
        return f"{text}; the shortcut {kind}"
    if _is_concatenation(form) and parts and len(terms) > len(parts):
        return f"{text}; the state is kept and concatenated with a function of it"
    return f"{text}; hidden in {', '.join(opaque)}" if opaque else text


def _moved(piece: Piece) -> str:
    """What moves alone do, in words: which entries are read once, again, or not, and what is new beside them."""
    (source,), (target,) = piece.sources, piece.targets
    meta = meta_of(target)
    ones = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
    edges = {node: piece.inputs(node) for node in piece.nodes}
    read = pull(piece.graph, piece.nodes, edges, {target: ones}).get(source)
    if read is None:
        return "nothing of the state goes on"
    told = ["entries are repeated"] if bool((read.abs() > 1).any()) else []
    told += ["some entries are left out"] if bool((read == 0).any()) else []
    if meta.numel > round(float(read.real.sum())):
        told.append("numbers that are not made of the state are put beside its entries")
    return "; ".join(told) if told else "the same entries are laid out in another shape"


def _is_concatenation(form: NormalForm) -> bool:
    name = operation(form.targets[0].node)
    return name in JOINS and form.targets[0] in form.piece.carrying


def _takes_entries(form: NormalForm, source: Value) -> bool:
    """Whether every new entry has one entry of a state at most, as it is: 2 x_n - x_(n-1) combines two."""
    piece, (target, *_) = form.piece, form.targets
    path, reached = piece.expand(target)[1], {source}
    for node in piece.nodes:
        taken = [v for v in piece.linear[node] if v in reached] if node in path else []
        if not taken:
            continue
        reached.update(outputs_of(node))
        passed = operation(node) in MOVES or (operation(node) in ADDS and len(taken) == 1)
        if not passed:
            return False
    number = form.forms[0][source]
    return number.low >= 0.0 and number.value == 1.0


def linear_map_as_skip(links: Sequence[Link], steps: tuple[int, ...]) -> Identification | None:
    """The record of a step that adds something to a linear map of its own state; None where it does not.

    What is added to the linear map of a value inside, behind a map that bends, tells nothing of a skip around the step.
    """
    kinds = [link.kind for link in links]
    maps = [link for link in links if link.kind == "map"]
    linear = [[s for s in link.form.stages if s.output in link.form.forms[0] and s.is_affine] for link in maps]
    of_state = all(found and all(_is_of(s, link) for s in found) for link, found in zip(maps, linear, strict=True))
    adds = [len(found) < len(link.form.forms[0]) for link, found in zip(maps, linear, strict=True)]
    if "join" in kinds or not of_state or not any(adds):
        return None
    first, last = kinds.index("map"), len(kinds) - kinds[::-1].index("map")
    if not all(adds) and "weightless" in kinds[first:last]:
        return None  # a layer and an activation before the addition: what is mapped there is no more the state
    after = [name for link in links if link.kind == "weightless" for name in link.operations]
    bent = f"the skip passes {', '.join(dict.fromkeys(after))}"
    if "weightless" in kinds[:first]:
        why = f"{bent} and a linear map: x' = P N(x) + f(x) is no step from x"
        return nothing(steps, "transformed skip", why, "measured")
    why = "the skip is a linear map of the state's own space, P x, and something is added to it"
    record = nothing(steps, LINEAR_SKIP, why, "proven", system="x' = P x + f(x), P a matrix")
    if not after:
        return record
    return replace(record, after=tuple(after), notes=(why, f"{bent} besides"), system="x' = N(P x + f(x)), P a matrix")


def _is_of(stage: Stage, link: Link) -> bool:
    """Whether a stage is an affine map of what a link begins with: no product with what depends on that before."""
    coefficients = [c for terms in stage.inputs for c in terms.values()]
    alone = len(stage.inputs) == 1 and stage.inputs[0].keys() == set(link.form.sources)
    return stage.is_affine and alone and all(c.kind in ("scalar", "moved") for c in coefficients)
