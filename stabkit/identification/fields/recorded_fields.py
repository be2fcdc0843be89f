"""The fields of a read method, where they were recorded: the Jacobian of each at the point where it was evaluated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.autograd.graph import Node

from stabkit.identification.form.normal_form import NormalForm, Stage
from stabkit.identification.form.pieces import ADDED, Piece
from stabkit.tracing import Step
from stabkit.tracing.cutting.samples import Layout, candidates
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, outputs_of
from stabkit.tracing.products.step_products import Products, Space

Place = tuple[int, int]  # of a value: the position of its node in the graph, -1 - i for source i; which output


@dataclass(frozen=True)
class RecordedField:
    """One evaluation of a field in a forward pass, as places in its graph.

    Its Jacobian is that of the way from one value to another through some nodes alone, over ``divisor``, less
    ``linear`` times the identity: what it is multiplied by in the tableau and on the way to it is not its own.

    Attributes:
        source: where the way begins: an old state, or an earlier stage.
        target: where it ends: a new state, or the result of the stage.
        nodes: on the way, each with the inputs that the way may take.
        divisor: the coefficients of the tableau along the way.
        linear: c where the field is g(x) - c x and the way holds g alone.
    """

    source: Place
    target: Place
    nodes: tuple[tuple[int, tuple[Place, ...]], ...]
    divisor: float
    linear: float = 0.0

    def times(self, h: float) -> RecordedField:
        """The same for h times the field."""
        return replace(self, divisor=self.divisor / h, linear=self.linear * h)

    def way(self, graph: Graph) -> tuple[Value, Value, dict[Node, list[Value]]]:
        """Where the way begins and ends in a graph, and its nodes in order with the inputs that it takes."""
        source, target = (_value(graph, place) for place in (self.source, self.target))
        return source, target, {graph.nodes[at]: [_value(graph, p) for p in taken] for at, taken in self.nodes}

    def products(self, step: Step) -> Products:
        """Products with ``divisor`` (J_f + ``linear`` I), per sample; the step is the one that holds it."""
        graph = step.segment.graph
        source, target, edges = self.way(graph)
        segment = step.segment.between([source], [target], 0, 0)
        segment.nodes, segment.graph = list(edges), graph.along(list(edges), edges)
        return Products(segment, _space(step, source), _space(step, target))


def _value(graph: Graph, place: Place) -> Value:
    position, output = place
    return graph.sources[-1 - position] if position < 0 else Value(graph.nodes[position], output)


def _place(graph: Graph, value: Value) -> Place:
    return (graph.rank[value.node], value.output) if value.node in graph.rank else (-1 - graph.sources.index(value), 0)


def _space(step: Step, value: Value) -> Space:
    """Coordinates of one value, samples laid out as in the states of the step."""
    meta = meta_of(value)
    for state in (step.source, step.target):
        if value in state.values:
            return Space([meta], [state.layouts[state.values.index(value)]])
    for state in (step.source, step.target):
        for known, layout in zip(state.values, state.layouts, strict=True):
            if meta_of(known).shape == meta.shape:
                return Space([meta], [layout])
    batch = step.source.space.batch
    return Space([meta], [next(iter(candidates(meta, batch)), Layout(1, None))])


def recorded_field(
    form: NormalForm, stage: Stage, number: int, given: Mapping[Value, float], out: float
) -> RecordedField | None:
    """Where the field of one row of a tableau was recorded; None where its way cannot be told from others.

    A field that reads several values has one row for each, and the way of a row begins at its own alone.

    Args:
        form: that the stage belongs to.
        stage: behind the row.
        number: which of the inputs of the stage.
        given: the entries of the row in A and U, by atom.
        out: its entry in B; 0 where no new state takes it.
    """
    piece, terms = form.piece, stage.inputs[number]
    users = sum(stage.output in row for row in (*form.forms, *(t for s in form.stages for t in s.inputs)))
    if users > 1 and meta_of(stage.output).numel > meta_of(form.targets[0]).numel:
        return None  # parts of it go to several places, and each is another field
    begin = next((a for a in terms if a in piece.sources and given.get(a)), None)
    if begin is None:
        begin = next((a for a in terms if a not in piece.ends and a.output != ADDED and given.get(a)), None)
    if begin is None:
        return None
    made_of = {e: {e} if e in piece.ends else set(piece.expand(e)[0]) for e in stage.entries}
    entries = [e for e, atoms in made_of.items() if terms.keys() <= atoms]
    others = [e for e in made_of if e not in entries]  # each of them is a row of its own
    if any(made_of[e] != terms.keys() for e in entries) or sum(t.keys() == terms.keys() for t in stage.inputs) > 1:
        return None
    if stage.output.output == ADDED and piece.linear[stage.output.node][0] in entries:
        return None  # what it is added to is what it is made of: one input, and two ways
    edges: dict[Node, list[Value]] = {}
    for entry in entries:
        if entry != begin:
            _follow(piece, begin, piece.expand(entry)[1], edges)
    for node in stage.nodes:
        taken = piece.inputs_of(stage.output) if node is stage.output.node else piece.inputs(node)
        edges[node] = [v for v in taken if v not in others]
    end, divisor = Value(stage.output.node, max(stage.output.output, 0)), given[begin]
    if out:
        target = next(t for t, found in zip(piece.targets, form.forms, strict=True) if stage.output in found)
        _follow(piece, stage.output, piece.expand(target)[1], edges)
        end, divisor = target, divisor * out
    graph = piece.graph
    known = [n for n in piece.nodes if n in edges]
    ways = tuple((graph.rank[n], tuple(_place(graph, v) for v in edges[n])) for n in known)
    return RecordedField(_place(graph, begin), _place(graph, end), ways, divisor)


def together(fields: Sequence[RecordedField | None]) -> RecordedField | None:
    """Several evaluations that are added with weights as one field, whose weight is their sum; None where not told."""
    known = [field for field in fields if field is not None]
    if len(known) < len(fields) or len({(f.source, f.target, f.linear) for f in known}) > 1:
        return None
    taken: dict[int, list[Place]] = {}
    for field in known:
        for position, places in field.nodes:
            taken.setdefault(position, []).extend(p for p in places if p not in taken.get(position, ()))
    nodes = tuple((position, tuple(places)) for position, places in sorted(taken.items()))
    return replace(known[0], nodes=nodes, divisor=sum(field.divisor for field in known))


def _follow(piece: Piece, begin: Value, path: Collection[Node], edges: dict[Node, list[Value]]) -> None:
    """Add the nodes of a linear path that ``begin`` reaches, with the inputs that it comes along."""
    reached = {begin}
    if begin.output == ADDED:  # an operation that adds it to its first input
        reached.update(outputs_of(begin.node))
    for node in piece.nodes:
        taken = [v for v in piece.linear.get(node, ()) if v in reached] if node in path else []
        if taken:
            edges[node] = [*edges.get(node, []), *(v for v in taken if v not in edges.get(node, []))]
            reached.update(outputs_of(node))
