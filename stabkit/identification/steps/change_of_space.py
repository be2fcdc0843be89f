"""What leads from one space to another: projections, pooled or padded shortcuts, concatenations."""

from __future__ import annotations

from collections.abc import Sequence

from stabkit.identification.form.chain import Link
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import JOINS, MOVES
from stabkit.tracing.graph.values import operation


def change_of_space(links: Sequence[Link], opaque: Sequence[str]) -> str:
    """What a step between two shapes does, in words."""
    form = max((link.form for link in links), key=lambda form: len(form.piece.nodes))
    terms = form.forms[0]
    affine = [s for s in form.stages if s.is_affine and s.output in terms]
    parts = [terms[a] for a in form.sources if a in terms]
    if all(operation(node) in MOVES for link in links for node in link.form.piece.nodes):
        return "the same entries are laid out in another shape, or some of them are taken"
    text = "the space changes, so this is no step of a method"
    if any(link.kind == "map" and link.form is not form for link in links):
        return f"{text}; hidden in {', '.join(opaque)}" if opaque else text  # what leads around one part is no shortcut
    if affine and not parts and len(terms) > len(affine):
        return f"{text}; the shortcut is a projection, a linear map"
    if parts and len(terms) > len(parts):
        kind = {"part": "takes or pads entries of the state (option A)", "moved": "moves entries"}
        return f"{text}; the shortcut {kind.get(parts[0].kind, 'passes the state on')}"
    if _is_concatenation(form):
        return f"{text}; the state is kept and concatenated with a function of it"
    return f"{text}; hidden in {', '.join(opaque)}" if opaque else text


def _is_concatenation(form: NormalForm) -> bool:
    name = operation(form.targets[0].node)
    return name in JOINS and form.targets[0] in form.piece.carrying
