"""A step between two single tensors as a chain: additions to the state, and maps before, between and after them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import ADDS, MOVES, SCALES, WRITES
from stabkit.identification.form.pieces import Piece
from stabkit.tracing.graph.graph import Element, Graph, element_of
from stabkit.tracing.graph.values import Value, operation, outputs_of

_PLAIN = MOVES | ADDS | SCALES


@dataclass(frozen=True, eq=False)
class Link:
    """What happens between two values through which everything passes.

    Attributes:
        kind: ``"sum"`` (a state and something added to it), ``"join"`` (a state and something put beside it),
            ``"scaling"`` (moves, scalings), ``"weightless"`` (a norm, an activation) or ``"map"`` (anything with
            weights that has no skip).
        form: the normal form.
        nodes: its operations other than moves, additions and scalings.
    """

    kind: str
    form: NormalForm
    nodes: tuple[Node, ...]

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of its nodes; a module whose call is known as one counts as one, by its class."""
        return tuple(operation(e) if isinstance(e, Node) else e.name for e in self.elements)

    @property
    def elements(self) -> tuple[Node | Element, ...]:
        """Its nodes, with activations and norms in the place of theirs."""
        graph = self.form.piece.graph
        return tuple(dict.fromkeys(element_of(graph, node) or node for node in self.nodes))


def chain(whole: Piece, form_of: Callable[[Piece], NormalForm], owned: Collection[Node] = ()) -> tuple[Link, ...]:
    """The links of a step from one tensor to another.

    Args:
        whole: all operations between the two.
        form_of: gives the normal form of a part of them, or of the whole.
        owned: operations that belong to fields, whatever they do.
    """
    (source,), (target,) = whole.sources, whole.targets
    links: list[Link] = []
    held = _made_of_held(whole)
    cuts = _cuts(whole, source, target, held)
    start = 0
    for a, (b, stop) in zip([source, *(value for value, _ in cuts)], cuts, strict=False):
        if len(cuts) == 1 and not owned:
            part = whole
        else:
            nodes = [*(node for node in whole.nodes[:start] if node in held), *whole.nodes[start:stop]]
            part = Piece(whole.graph, nodes, [a], [b], contexts=whole.contexts, owned=owned)
        links.append(_link(form_of(part)))
        start = stop
    return tuple(links)


def _made_of_held(piece: Piece) -> set[Node]:
    """The operations on what is held fixed alone: features of an input, which several parts of a step may read."""
    found: set[Node] = set()
    for node in piece.nodes if piece.contexts else ():
        given = piece.inputs(node)
        if given and all(value in piece.contexts or value.node in found for value in given):
            found.add(node)
    return found


def _cuts(piece: Piece, source: Value, target: Value, held: Collection[Node]) -> list[tuple[Value, int]]:
    """The values through which everything passes, each with the position after which it is alone; the target last.

    What is held fixed, and what that alone makes (``held``), passes beside them.
    """
    last: dict[Value, int] = {target: len(piece.nodes)}
    for position, node in enumerate(piece.nodes):
        for value in piece.inputs(node):
            if value not in piece.contexts and value.node not in held:
                last[value] = max(last.get(value, 0), position)
    dies: dict[int, list[Value]] = {}
    for value, position in last.items():
        dies.setdefault(position, []).append(value)
    alive = {source}
    found: list[tuple[Value, int]] = []
    for position, node in enumerate(piece.nodes):
        alive.update(value for value in outputs_of(node) if value in last)
        alive.difference_update(dies.get(position, ()))
        if len(alive) == 1 and (value := next(iter(alive))) != source and value not in piece.stacked:
            whole = piece.graph.composites.get(value.node)
            if operation(value.node) in WRITES or (whole is not None and whole.target != value):
                continue  # a buffer that holds the state among other things; the inside of what is known as one
            found.append((value, position + 1))
    return found if found and found[-1][0] == target else [*found, (target, len(piece.nodes))]


def _link(form: NormalForm) -> Link:
    piece, target = form.piece, form.targets[0]
    nodes = tuple(node for node in piece.nodes if operation(node) not in _PLAIN or node in piece.graph.composites)
    if target in piece.carrying:
        kind = "sum" if form.merges else "join" if form.stages else "scaling"
    elif piece.base[target] == piece.sources[0]:
        kind = "weightless"
    else:
        kind = "map"
    return Link(kind, form, nodes)


def joined(graph: Graph, links: Sequence[Link]) -> Piece:
    """Several links, one after the other, as one piece."""
    nodes = {node for link in links for node in link.form.piece.nodes}
    return Piece(graph, [n for n in graph.nodes if n in nodes], links[0].form.sources, links[-1].form.targets)
