"""A step of several states as one step after another: cut where as many values as there are states carry everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.autograd.graph import Node

from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.tableau import Blocks, blocks
from stabkit.identification.names.single import Name, name_one_state
from stabkit.tracing.graph.values import Value, meta_of, outputs_of

_UNSPECIFIC = "general linear method"  # a part that ends within the step of a queue has this name as well
_OF_HISTORY = ("delayed", _UNSPECIFIC, "ab", "Adams")  # steps that remember are of one system, whatever their fields
_FEW = 3  # states of which every order is tried
Form = Callable[[Sequence[Node], Sequence[Value], Sequence[Value]], NormalForm]


def composed_name(piece: Piece, name_of: Callable[[Blocks], Name], form_of: Form) -> Name | None:
    """The name of a step that is two known steps or more, one after the other; None where it is not.

    Args:
        piece: the whole step.
        name_of: what a tableau is called.
        form_of: the normal form of some nodes between old and new states.
    """
    found = _run_of_names(piece, lambda t: n if not (n := name_of(t)).name.startswith(_UNSPECIFIC) else None, form_of)
    found = found or _run_of_names(piece, name_of, form_of)
    if len(found) < 2:
        return None
    names = list(dict.fromkeys(name.name for name in found))
    sizes = [name.h for name in found]
    text = f"{len(found)} steps of {names[0]}" if len(names) == 1 else " and then ".join(n.name for n in found)
    same = max(sizes) - min(sizes) <= 1e-9 * max(map(abs, sizes))
    convention = found[0].convention if same else f"h: {', '.join(f'{h:.3g}' for h in sizes)}, one after the other"
    several = len(names) > 1 or not names[0].startswith(_OF_HISTORY)
    return replace(found[0], name=f"Lie splitting ({text})" if several else text, h=sizes[0], convention=convention)


def _run_of_names(piece: Piece, name_of: Callable[[Blocks], Name | None], form_of: Form) -> list[Name]:
    """The names of parts that are known, one after the other; none unless they make all of a step."""
    contexts = set(piece.contexts)
    ends = [(0, piece.sources), *cuts(piece), (len(piece.nodes), piece.targets)]
    found: list[Name] = []
    start, old = ends[0]
    for stop, new in ends[1:]:
        form = form_of(piece.nodes[start:stop], old, new)
        if stop < len(piece.nodes) and _are_crossed(form):
            new = new[::-1]
            form = form_of(piece.nodes[start:stop], old, new)
        name = _named(form, contexts, name_of)
        if name is not None:
            found.append(name)
            start, old = stop, new
    return found if start == len(piece.nodes) else []


def _are_crossed(form: NormalForm) -> bool:
    """Whether each of two new states follows the other old one alone: they were made in the other order."""
    if len(form.sources) != 2:
        return False
    carried = [[v for v in form.sources if v in terms] for terms in form.forms]
    return carried == [[form.sources[1]], [form.sources[0]]]


def _named(form: NormalForm, contexts: Collection[Value], name_of: Callable[[Blocks], Name | None]) -> Name | None:
    """The name of one part; None where it has none, or no field of its own."""
    if not form.stages:
        return None
    table = blocks(form, contexts)
    name = None if table is None or not table.rows else name_of(table)
    return name if name is not None and name.is_known else None


def cuts(piece: Piece) -> list[tuple[int, tuple[Value, ...]]]:
    """Positions inside at which as many values as there are states are alive, of the same shapes, in their order."""
    last: dict[Value, int] = dict.fromkeys(piece.targets, len(piece.nodes))
    for position, node in enumerate(piece.nodes):
        for value in piece.inputs(node):
            last[value] = max(last.get(value, 0), position)
    shapes = sorted(meta_of(v).shape for v in piece.sources)
    count = len(piece.sources)
    order = {v: (place - count, 0) for place, v in enumerate(piece.sources)}
    order.update({v: (place, v.output) for place, node in enumerate(piece.nodes) for v in outputs_of(node)})
    alive = set(piece.sources)
    found: list[tuple[int, tuple[Value, ...]]] = []
    for position, node in enumerate(piece.nodes[:-1]):
        alive.update(v for v in outputs_of(node) if v in last)
        alive = {v for v in alive if last.get(v, -1) > position}
        states = [v for v in alive if v not in piece.contexts]
        if sorted(meta_of(v).shape for v in states) == shapes and all(v in piece.carrying for v in states):
            found.append((position + 1, tuple(sorted(states, key=order.__getitem__))))
    return found


@dataclass(frozen=True)
class Readout:
    """One state beside sums of outputs that nothing reads.

    Attributes:
        name: of the method of that state.
        table: its tableau.
        source: which of the old states it is.
        target: which of the new ones.
    """

    name: Name
    table: Blocks
    source: int
    target: int


def with_readout(found: Blocks) -> Readout | None:
    """One state beside sums of outputs that nothing reads: the method of that state, whichever was made first."""
    count = len(found.V)
    orders = itertools.permutations(range(count)) if count <= _FEW else [tuple(range(count))]
    read = (_beside_sums(found, order) for order in orders)
    return next((one for one in read if one is not None), None)


def _beside_sums(found: Blocks, order: Sequence[int]) -> Readout | None:
    V, B = found.V[list(order)], found.B[list(order)]
    sums = [j for j in range(len(V)) if V[j, j] == 1.0 and not found.U[:, j].any()
            and not np.delete(V[:, j], j).any()]  # fmt: skip
    rest = [j for j in range(len(V)) if j not in sums]
    if not sums or len(rest) != 1:
        return None
    i = rest[0]
    used = B[i] != 0
    for _ in range(used.size):  # what feeds a field that is used
        used = used | (found.A[used] != 0).any(axis=0)
    keep = [int(k) for k in np.flatnonzero(used)]
    one = Blocks(
        found.A[keep][:, keep], found.U[keep, i : i + 1], B[i : i + 1, keep], V[i : i + 1, i : i + 1],
        tuple(found.fields[k] for k in keep), tuple(found.rows[k] for k in keep),
        tuple(found.recorded[k] for k in keep),
    )  # fmt: skip
    name = name_one_state(one)
    if not name.is_known or not len(keep):
        return None
    outputs = "a sum of outputs" if len(sums) == 1 else f"{len(sums)} sums of outputs"
    return Readout(replace(name, name=f"{name.name}, beside {outputs}"), one, i, order[i])
