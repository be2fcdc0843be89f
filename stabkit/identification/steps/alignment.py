"""What in one step stands where something stands in another one: the operations of both, side by side.

Steps of one loop are made of the same operations in the same order, and the first and the last of them of fewer: a
state that begins as zeros multiplies nothing, and what nobody reads at the end is not there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of

# what an operation saves of plain numbers: factors, and where activations bend
_NUMBERS = tuple(
    f"_saved_{name}"
    for name in ("alpha", "other", "self", "value", "lambd", "threshold", "negative_slope", "min", "max", "beta")
)

Images = dict[Value, Value | None]  # None: what stands there is a constant


def images_before(
    graph: Graph, pairs: Iterable[tuple[Value, Value]], sources: Collection[Value], nodes: Collection[Node]
) -> Images:
    """What stands in one step where values of another do, from the new states of both back to the old ones.

    Args:
        graph: of both steps.
        pairs: the new states, those of the step that is known first.
        sources: the old states of the step that is known, where the way ends.
        nodes: the operations of both.
    """
    found: Images = {}
    stack: list[tuple[Value, Value | None]] = list(pairs)
    while stack:
        known, image = stack.pop()
        if known in found and (image is None or found[known] is not None):
            continue
        found[known] = image
        if known in sources or known.node not in nodes:
            continue
        if image is None:  # all that it is made of may be a constant there, unless it is met on another way
            stack.extend((v, None) for v in graph.inputs[known.node])
        elif image.node in nodes and _are_alike(known, image):
            for v, other in zip(_arguments(graph, known.node), _arguments(graph, image.node), strict=True):
                if v is not None:
                    stack.append((v, other))
    return found


def is_same_from(
    graph: Graph,
    pairs: Iterable[tuple[Value, Value]],
    old: Mapping[Value, Value | None],
    known: Collection[Node],
) -> bool:
    """Whether new states are made by the operations of a known step, but for those that read constants alone.

    Operations on constants leave no trace; one that combines a constant with something else has no edge to it. So the
    two are the same where each operation meets its like, and a constant only what the known step makes of such states.
    Gates and fields need no coefficients for that.

    Args:
        graph: of both steps.
        pairs: the new states, those of the step that is known first.
        old: what stands where the old states of the known step do; None for a constant.
        known: the operations of the step that is known.
    """
    inside, stack = set(known), list(pairs)
    of_constants = {value for value, image in old.items() if image is None}
    for node in known:
        taken = graph.inputs[node]
        if taken and of_constants.issuperset(taken):
            of_constants.update(outputs_of(node))
    seen: set[tuple[Value, Value]] = set()
    while stack:
        one, other = stack.pop()
        if (one, other) in seen:
            continue
        seen.add((one, other))
        if one in old:
            if old[one] != other:
                return False
        elif one.node in inside:
            if not _are_alike(one, other) or _numbers(one.node) != _numbers(other.node):
                return False
            for a, b in zip(_arguments(graph, one.node), _arguments(graph, other.node), strict=True):
                if a is None or b is None:
                    if a is not b and (a is None or a not in of_constants):
                        return False
                else:
                    stack.append((a, b))
        elif meta_of(one).shape != meta_of(other).shape:
            return False
    return bool(seen)


def _numbers(node: Node) -> list[object]:
    """The plain numbers by which an operation multiplies what it is given, or bends it."""
    saved = [getattr(node, name, None) for name in _NUMBERS]
    known = [n for n in saved if n is not None]  # and which tensors are kept depends on what they multiply
    plain = [n for n in known if not isinstance(n, Tensor) or (not n.dim() and not n.requires_grad)]
    return [float(n) if isinstance(n, Tensor) else n for n in plain]


def images_after(
    graph: Graph, seeds: Mapping[Value, Value], known: Sequence[Node], nodes: Sequence[Node]
) -> dict[Value, Value]:
    """What stands in one step where values of another do, from the old states of both on.

    Args:
        graph: of both steps.
        seeds: the old states, by those of the step that is known.
        known: the operations of the step that is known, in order.
        nodes: those of the other.
    """
    readers: defaultdict[Value, list[Node]] = defaultdict(list)
    for node in nodes:
        for value in dict.fromkeys(graph.inputs[node]):
            readers[value].append(node)
    found = dict(seeds)
    taken: set[Node] = set()
    for node in known:
        met = [found[v] for v in graph.inputs[node] if v in found]
        image = next((n for n in readers[met[0]] if n not in taken and _reads_alike(graph, node, n, found)), None) if (
            met) else None  # fmt: skip
        if image is not None:
            taken.add(image)
            found.update(zip(outputs_of(node), outputs_of(image), strict=True))
    return found


def _are_alike(one: Value, other: Value) -> bool:
    """Whether two values are the same output of operations of one kind and shape."""
    same = operation(one.node) == operation(other.node) and one.output == other.output
    return same and meta_of(one).shape == meta_of(other).shape and _counts(one.node) == _counts(other.node)


def _counts(node: Node) -> tuple[int, int]:
    return len(node.next_functions), len(outputs_of(node))


def _reads_alike(graph: Graph, known: Node, node: Node, found: Mapping[Value, Value]) -> bool:
    """Whether an operation is of the kind of another and reads what stands where that reads."""
    if operation(known) != operation(node) or _counts(known) != _counts(node):
        return False
    if any(meta_of(a).shape != meta_of(b).shape for a, b in zip(outputs_of(known), outputs_of(node), strict=True)):
        return False
    arguments = zip(_arguments(graph, known), _arguments(graph, node), strict=True)
    return all((a is None) == (b is None) and (a is None or found.get(a, b) == b) for a, b in arguments)


def _arguments(graph: Graph, node: Node) -> list[Value | None]:
    """What an operation takes, by place; None for what does not depend on the input."""
    taken = set(graph.inputs[node])
    arguments = [None if parent is None else Value(parent, output) for parent, output in node.next_functions]
    return [v if v in taken else None for v in arguments]
