"""Activations that code writes out: x + sin(a x)^2 / a, x sigmoid(b x), x (1 + tanh(..)) / 2.

What is a function of every entry alone, by sums and products of several functions of one value, and is read by matrices
alone, bends what one layer gives to the next. The same sum whose result is carried on beside what is made of it is a
step of an equation for each entry, and so is one that follows another of its kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from stabkit.tracing.graph.values import Value, meta_of, metas_of, operation
from stabkit.vocabulary import is_activation, moves, norm_of

_SUMS = frozenset({"Add", "Sub", "Rsub"})
_PRODUCTS = frozenset({"Addcmul", "Addcdiv", "Div", "Lerp", "Mul"})
#: Operations on every entry alone that are no activations by themselves.
_MATHEMATICS = frozenset(
    {
        "Abs", "Acos", "Asin", "Asinh", "Cos", "Cosh", "Erfc", "Exp", "Exp2", "Expm1", "Log", "Log1P", "LogAddExp",
        "Maximum", "Minimum", "Neg", "Pow", "Reciprocal", "Rsqrt", "Sinc", "Sinh", "Sqrt", "Tan", "Where",
    }
)  # fmt: skip
_IN_PLACE = moves("reshape", "copy")
_ENTRYWISE = _SUMS | _PRODUCTS | _MATHEMATICS | _IN_PLACE
_MOVES = moves()
_WEIGHTED = (
    "Addbmm", "Addmm", "Addmv", "Baddbmm", "Bmm", "Convolution", "Linear", "MkldnnLinear", "Mm", "Mv", "SparseMm",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Function:
    """What is made of one value entry by entry.

    Attributes:
        root: the value.
        nodes: the operations, in order.
    """

    root: Value
    nodes: tuple[Node, ...]

    @property
    def signature(self) -> tuple[str, ...]:
        """What it computes, as far as its operations say."""
        return tuple(operation(node) for node in self.nodes if operation(node) not in _IN_PLACE)


def activations_by_hand(
    nodes: Sequence[Node], inputs: Mapping[Node, Sequence[Value]], targets: Collection[Value]
) -> frozenset[Node]:
    """The operations of activations that are written as sums or products of several functions of one value.

    Args:
        nodes: of a graph, in order.
        inputs: what each reads.
        targets: where the graph ends.
    """
    readers: defaultdict[Value, list[Node]] = defaultdict(list)
    for node in nodes:
        for value in inputs[node]:
            readers[value].append(node)
    functions = [f for f in _functions(nodes, inputs)
                 if any(len(inputs[node]) > 1 for node in f.nodes) and not _is_multiple(f, inputs)]  # fmt: skip
    steps = [f for f in functions if not _bends_for_matrices(f, readers, targets) or _goes_on(f, inputs)]
    others = {f.signature for f in steps}
    return frozenset(node for f in functions if f.signature not in others for node in f.nodes)


def _is_multiple(function: _Function, inputs: Mapping[Node, Sequence[Value]]) -> bool:
    """Whether nothing but numbers multiplies the value: (x + x) / 2, as iterations that begin at x have it."""

    def scales(node: Node) -> bool:
        divided = operation(node) == "Div" and node.next_functions[0][0] is not None  # and not what divides
        return (operation(node) == "Mul" or divided) and len(inputs[node]) == 1

    return all(operation(node) in _SUMS | _IN_PLACE | {"Neg"} or scales(node) for node in function.nodes)


def _functions(nodes: Sequence[Node], inputs: Mapping[Node, Sequence[Value]]) -> Iterable[_Function]:
    roots: dict[Value, Value] = {}
    made: defaultdict[Value, list[Node]] = defaultdict(list)
    for node in nodes:
        found = {roots.get(v, v) for v in inputs[node]}
        if len(found) != 1 or not _is_entrywise(node):
            continue
        (root,) = found
        if metas_of(node)[0].numel == meta_of(root).numel:  # nothing is spread over others
            roots[Value(node, 0)] = root
            made[root].append(node)
    return [_Function(root, tuple(of_root)) for root, of_root in made.items()]


def _is_entrywise(node: Node) -> bool:
    return operation(node) in _ENTRYWISE or is_activation(node)


def _bends_for_matrices(function: _Function, readers: Mapping[Value, list[Node]], targets: Collection[Value]) -> bool:
    """Whether all that it gives out is read by matrices, past moves and norms; or is the end, behind a matrix."""
    own = set(function.nodes)
    stack, seen = [Value(node, 0) for node in function.nodes], set[Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in targets and not _is_weighted(function.root.node):
            return False
        for node in readers.get(value, ()):
            if node in own or _is_weighted(node):
                continue
            if operation(node) not in _MOVES and norm_of(node) is None:
                return False
            stack.append(Value(node, 0))
    return True


def _is_weighted(node: Node) -> bool:
    return operation(node).startswith(_WEIGHTED)


def _goes_on(function: _Function, inputs: Mapping[Node, Sequence[Value]]) -> bool:
    """Whether a sum that carries the value on is itself carried on beside what is made of it: several steps."""
    linear: set[Value] = {function.root}
    made_of: dict[Value, set[Value]] = {}  # of every value the sums that it was made of
    sums: set[Value] = set()
    for node in function.nodes:
        value, given = Value(node, 0), inputs[node]
        made_of[value] = set().union(*(made_of.get(v, set()) for v in given)) | sums.intersection(given)
        carried = [v for v in given if v in linear]
        alone = len(given) == 1 and operation(node) in _SUMS | _IN_PLACE | {"Mul", "Div", "Neg"}
        if not carried or not (alone or operation(node) in _SUMS):
            continue
        linear.add(value)
        others = [v for v in given if v not in linear]
        before = set().union(*(made_of.get(v, set()) | ({v} & sums) for v in carried))
        if any(before & (made_of.get(v, set()) | {v}) for v in others):
            return True
        if others:
            sums.add(value)
    return False
