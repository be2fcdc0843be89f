"""Where a flow begins: the input that leads furthest, unless it conditions another, or is where a recurrence starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import Node

from stabkit.errors import TraceError
from stabkit.tracing.cutting.endpoints import UnreachedError
from stabkit.tracing.flow import engine_vjp
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, random_tensors
from stabkit.tracing.products.node_derivatives import apply_node, is_python_node
from stabkit.tracing.recording.inputs import Source
from stabkit.vocabulary import moves

_MOST = 0.5  # share of the longest way from which an input passes most of the model
_EMBEDDING = 0.25  # share of its operations that embed a condition, at most
_AGAIN = 2  # times as often as the main input a condition is let in, at least
_THROUGHOUT = 1 / 3  # share of a way after which a condition of its blocks is let in again: two blocks, and a head
_CONDITIONS = 8  # times as large as an input that conditions it an input is, at least
_WHOLE = 0.5  # share of what all blocks read of a source from which one reads the whole; of two times, one is half
_TRIED = 8  # places at which it is asked what is read, at most: each costs a VJP of what embeds the source

_SCALING = frozenset({"Mul", "Div", "Neg"})
_ADDING = frozenset({"Add", "Sub", "Rsub", "Addcmul", "Addcdiv", "Lerp"}) | _SCALING
_CARRYING = _ADDING | (moves() - moves("expand"))


def graph_between(source: Source, targets: Sequence[Value]) -> Graph:
    """The operations from a source to those of some targets that it leads to."""
    if len(targets) > 1:
        targets = [value for value in targets if Graph([source.value], [value]).reached] or targets
    return Graph([source.value], targets)


def find_source(sources: Sequence[Source], targets: Sequence[Value], wanted: str | None) -> tuple[Graph, Source]:
    """The source with the longest way to the targets; among equals the larger, then the earlier.

    A time, a label or another input that conditions what is made of a much larger one may well have the longest way,
    by the few operations that embed it; depth is counted from the larger, and from the one that enters once where
    another is let in at every block. So it is from one that sums and numbers alone carry to the targets, as a sampler
    carries its noise, and not from a label that is embedded at each call of the network. A sequence of which every
    round reads another part is what a recurrence works on, and the state with which it begins is not.
    """
    if wanted is not None:
        sources = [s for s in sources if s.name == wanted] or _unknown_source(sources, wanted)
    reached = []
    for candidate in sources:
        graph = graph_between(candidate, targets)
        if graph.reached:
            reached.append((graph, candidate))
    if not reached and not sources:
        raise UnreachedError(
            "no input carries derivatives to the output: float inputs of sparse layout are held fixed (pass a dense "
            "tensor), and integer inputs must be looked up in a table or cast to floats"
        )
    if not reached:
        named = ", ".join(dict.fromkeys(repr(candidate.name) for candidate in sources))
        raise UnreachedError(f"the output does not depend differentiably on the input that was given ({named})")
    direct = [pair for pair in reached if pair[1].how == "input" or pair[1].embedded] or reached
    longest = max(len(graph.nodes) for graph, _ in direct)
    if longest == 0:
        raise TraceError("the output is the input itself: there is no step between them")
    through = [pair for pair in direct if len(pair[0].nodes) >= _MOST * longest]
    through = [a for a in through if not any(_gives_way(a[0], b[0]) for b in through if b is not a)] or through
    largest = max(_numel(pair) for pair in through)
    main = [pair for pair in through if _numel(pair) * _CONDITIONS >= largest]
    if len(main) > 1:
        main = [pair for pair in main if _is_carried(pair[0])] or main
    nearly = [pair for pair in main if len(pair[0].nodes) >= 0.9 * max(len(graph.nodes) for graph, _ in main)]
    return max(nearly, key=_numel)


def _gives_way(graph: Graph, main: Graph) -> bool:
    """Whether a source conditions another, or is the state with which a recurrence over another begins."""
    if _enters_again(graph, main):  # data that are compared with what is made of them enter every step as well
        most, others = (max(_carried(one).values()) for one in (graph, main))
        return not (most >= _AGAIN and most > others) and _is_read_whole(graph, main)
    return _enters_again(main, graph) and not _is_read_whole(main, graph) and not _is_carried(graph, alone=True)


def _enters_again(graph: Graph, main: Graph) -> bool:
    """Whether a source is let in again and again along the way of another, which enters once.

    The operations that a source alone leads to are few for a condition, and each of its embeddings enters a block. A
    sequence that an encoder reads enters every block of a decoder too, but has most of its own operations before. A
    state that weights of edges meet in one layer enters their way several times too, but nowhere else.
    """
    both = set(graph.nodes)
    shared = [node for node in main.nodes if node in both]
    entries = _entries(graph, shared)
    own = len(graph.nodes) - len(shared)
    again = len(entries) >= _AGAIN * max(1, len(_entries(main, shared)))
    return own <= _EMBEDDING * len(graph.nodes) and again and entries[-1] >= _THROUGHOUT * len(shared)


def _entries(graph: Graph, shared: Sequence[Node]) -> list[int]:
    """Places of operations on the way of another source too that take something that this one alone leads to."""
    inside = set(shared)
    return [i for i, node in enumerate(shared) if any(value.node not in inside for value in graph.inputs[node])]


def _is_read_whole(graph: Graph, main: Graph) -> bool:
    """Whether what is let in along the way of another source is made of all of this one at each place.

    So a time or a label is, or parts of it that are read early and late alike, such as the real and the imaginary part
    of a map; of a sequence every round of a recurrence reads another part.
    """
    inside = set(graph.nodes) & set(main.nodes)
    let_in = [v for n in graph.nodes if n in inside for v in graph.inputs[n] if v.node not in inside]
    values = list(dict.fromkeys(let_in))
    tried = values[:: -(-len(values) // _TRIED)]
    read = []
    for value in tried:
        (pulled,) = engine_vjp([value], graph.sources, random_tensors([value], 0))
        read.append(pulled != 0)
    read = [mask for mask in read if bool(mask.any())]  # an embedding of zeros lets nothing through yet
    if not read:
        return True
    shares, known = [float(mask.sum()) for mask in read], float(torch.stack(read).any(0).sum())
    third = -(-len(read) // 3)
    again = torch.stack(read[:third]).any(0) & torch.stack(read[-third:]).any(0)
    return max(sum(shares) / len(shares), float(again.sum()) * (len(read) > 2)) > _WHOLE * known


def _is_carried(graph: Graph, *, alone: bool = False) -> bool:
    """Whether a source goes on to the targets along sums and numbers, ``alone`` along sums, entry by entry."""
    carried = _carried(graph, alone=alone)
    return any(value in carried for value in graph.targets)


def _carried(graph: Graph, *, alone: bool = False) -> dict[Value, int]:
    """The values that a source goes on to along sums and numbers, and how many things that it makes were added."""
    carried = dict.fromkeys(graph.sources, 0)
    for node in graph.nodes:
        given = graph.inputs[node]
        if not any(value in carried for value in given) or is_python_node(node) or operation(node) not in _CARRYING:
            continue
        made, most = outputs_of(node), max(carried[value] for value in given if value in carried)
        if operation(node) not in _ADDING:
            carried.update(dict.fromkeys(made, most))
            continue
        if operation(node) in _SCALING and len(given) > 1:
            continue  # a product with something else that the source leads to
        meta = meta_of(made[0])
        ones = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
        for value, factor in apply_node(node, [ones], given):
            first = factor.flatten()[:1]
            if value in carried and factor.numel() == meta.numel and bool((factor == first).all()) and bool(first):
                carried.update(dict.fromkeys(made, most + (len(given) > 1)) if not alone or bool(first == 1) else {})
    return carried


def _numel(pair: tuple[Graph, Source]) -> int:
    return meta_of(pair[1].value).numel


def _unknown_source(sources: Sequence[Source], wanted: str) -> list[Source]:
    known = ", ".join(repr(s.name) for s in sources)
    raise TraceError(f"source={wanted!r} is not an input or embedding of this model; there are: {known or 'none'}")
