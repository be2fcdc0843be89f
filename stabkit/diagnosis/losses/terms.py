"""The terms that a loss is a sum of, with what each contributes: down to the first operation that is no sum.

Sums, means, signs, constant factors and what only moves numbers are passed through, in the loss and in a model that
returns a loss or a log-density itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.tracing.graph.values import Value, meta_of, operation, value_of
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.randomness import seeded
from stabkit.tracing.recording.recorder import Call, Recording, recording_calls
from stabkit.tracing.recording.training_pass import TrainingPass, calling_line, nodes_above, nodes_from, path_of
from stabkit.vocabulary import moves, norm_of

_LINEAR = moves("reshape", "permute", "copy", "select", "gather", "join", "expand", "pad") | {
    "Sum",
    "Mean",
    "Neg",
    "Rsub",
}
_KEPT = _LINEAR - moves("select", "gather") - {"Sum", "Mean"} | {"Add", "Sub", "Mul", "Div"}  # that keep every entry
_SUMS = _LINEAR | {"Add", "Sub", "Mul", "Div"}
#: operations that multiply by a matrix; what one makes is a score, and no term of a likelihood or of a distance
MATRICES = frozenset({"Addmm", "Mm", "Bmm", "Baddbmm", "Addmv", "Mv", "Dot", "Convolution", "Linear", "Embedding"})
_LIKELIHOODS = frozenset({"LogSoftmax", "Logsumexp", "NllLoss", "LogSigmoid", "BinaryCrossEntropyWithLogits"})
_MOST = 64  # terms that are followed
_NORMALISED = 1e-3  # by how much rows of probabilities may miss a sum of 1


@dataclass(frozen=True)
class Term:
    """A summand of a loss.

    Attributes:
        node: what made it.
        name: the function that did, as it is called.
        line: where it was called.
        coefficient: of every entry in the loss.
        value: its entries, on the graph.
        weighted: whether samples have weights of their own, such as advantages.
        score: whether it is what a matrix gives, or a parameter, and serves for nothing else.
        factor: parameters that alone make one of its two factors.
        other: the other factor, and what made it.
        group: the summand of the whole loss that it belongs to.
    """

    node: Node
    name: str
    line: str
    coefficient: Tensor
    value: Tensor
    weighted: bool
    score: bool
    factor: tuple[Tensor, ...] = ()
    other: tuple[Node, Tensor] | None = None
    group: int = 0

    @property
    def part(self) -> Tensor:
        """What it contributes to the loss, on the graph."""
        return (self.coefficient * self.value).sum()

    @property
    def size(self) -> float:
        """What its entries contribute without their signs, and one unit of each: logarithms begin anywhere."""
        weights = self.coefficient.double().abs()
        return float((weights * (1 + self.value.detach().double().abs())).sum())


class _Made(TorchFunctionMode):
    """Every result on the graph, by its value, with the function and the line that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[Value, tuple[str, str, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.grad_fn is not None:
                self.of[value_of(each)] = (getattr(func, "__name__", "").strip("_"), calling_line(), each)
        return out


@dataclass(frozen=True)
class Evaluated:
    """A loss with its terms.

    Attributes:
        loss: the scalar, on the graph.
        output: what the model returned.
        terms: in the order in which the graph is walked, which is the same at every pass.
        calls: of modules, in the order of their beginnings.
        made: every result on the graph, by its value, with the function and the line that made it.
    """

    loss: Tensor
    output: Any
    terms: tuple[Term, ...]
    calls: list[Call]
    made: Mapping[Value, tuple[str, str, Tensor]]

    def path_of(self, term: Term) -> str:
        """The module that makes a term, ``""`` where the loss does."""
        return path_of(TrainingPass(self.calls, self.output), term.node)


def evaluated(call: ForwardPass, loss: Callable[[Any], Tensor]) -> Evaluated:
    """One pass and its terms.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
    """
    made, recording = _Made(), Recording()
    seeded(call.seed)
    with torch.enable_grad(), made, recording_calls(call.module, recording):
        output = call.called()
        scalar = loss(output)
    terms = _terms(scalar, made) if scalar.grad_fn is not None else ()
    return Evaluated(scalar, output, terms, recording.calls, made.of)


def _terms(scalar: Tensor, made: _Made) -> tuple[Term, ...]:
    consumers: dict[Value, list[Node]] = defaultdict(list)
    for node in nodes_above(scalar):
        for parent, number in node.next_functions:
            if parent is not None:
                consumers[Value(parent, number)].append(node)
    ends: dict[Value, tuple[bool, int, bool]] = {}
    whole = value_of(scalar)
    groups = _groups(whole, consumers)
    stack = [(value, value if value in made.of else whole, weighed, i) for i, (value, weighed) in enumerate(groups)]
    seen = set[Value]()
    inner: list[Node] = []
    while stack and len(ends) < _MOST:
        value, named, weighed, place = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        named = value if value in made.of else named  # what a function of torch makes inside is known by its result
        parents = [Value(parent, number) for parent, number in value.node.next_functions if parent is not None]
        used = _is_used(value, consumers)
        if used or operation(value.node) not in _SUMS or not _is_sum(value.node, parents):
            bare = operation(value.node) in MATRICES or hasattr(value.node, "variable")
            score = not used and (bare or norm_of(value.node) is not None)
            others = ends.get(named, (False, 0, True))
            ends[named] = weighed or others[0], place, score and others[2]
            continue
        inner.append(value.node)
        stack += [(parent, named, weighed or _weighs(value.node), place) for parent in parents]
    coefficients = _coefficients(scalar, inner, groups)
    found = []
    for value, (weighed, place, score) in ends.items():
        if value not in made.of or value not in coefficients:
            continue
        name, line, tensor = made.of[value]
        factor, rest = _factor(value.node)
        other = None if rest is None or rest not in made.of else (rest.node, made.of[rest][2])
        held = (value.node, name, line, coefficients[value], tensor, weighed)
        found.append(Term(*held, score, factor, other, place))
    return tuple(found)


def _coefficients(scalar: Tensor, inner: Sequence[Node], groups: Sequence[tuple[Value, bool]]) -> dict[Value, Tensor]:
    """What each entry counts in a loss by way of sums alone: their own backward functions, the last of them first."""
    whole = value_of(scalar)
    chosen, ends, stack = dict.fromkeys(inner), {value for value, _ in groups}, [whole]
    while stack:  # those from the loss down to its summands
        value = stack.pop()
        if value in ends or value.node in chosen:
            continue
        chosen[value.node] = None
        stack += [Value(parent, number) for parent, number in value.node.next_functions if parent is not None]
    arrived: dict[Value, Tensor] = {whole: torch.ones_like(scalar)}
    with torch.no_grad():
        for node in sorted(chosen, key=lambda node: -node._sequence_nr()):
            given = [arrived.get(Value(node, place)) for place in range(len(node._input_metadata))]
            if all(each is None for each in given):
                continue
            backward: Any = node
            left = backward(*given)
            for (parent, number), gradient in zip(
                node.next_functions, left if isinstance(left, tuple) else (left,), strict=False
            ):
                if parent is not None and gradient is not None:
                    value = Value(parent, number)
                    arrived[value] = arrived[value] + gradient if value in arrived else gradient
    return arrived


def _groups(whole: Value, consumers: Mapping[Value, list[Node]]) -> list[tuple[Value, bool]]:
    """The summands of a loss, and whether each is weighted: scalars, or where there is one alone, its entries."""
    found, stack = list[tuple[Value, bool]](), [(whole, False)]
    while stack:
        value, weighted = stack.pop()
        parents = [Value(parent, number) for parent, number in value.node.next_functions if parent is not None]
        open_ = operation(value.node) in _SUMS and _is_sum(value.node, parents) and not _is_used(value, consumers)
        scalar = open_ and all(meta_of(parent).numel == 1 for parent in parents)
        alone = open_ and not stack and not found
        if scalar or (alone and len(parents) == 1):
            stack += [(parent, weighted or _weighs(value.node)) for parent in parents]
        elif alone:
            return [(parent, weighted) for parent in parents]
        else:
            found.append((value, weighted))
    return found


def _is_used(value: Value, consumers: Mapping[Value, list[Node]]) -> bool:
    """Whether a value enters something else than sums too, be it with another sign or scale."""
    users = consumers.get(value, [])
    return any(
        operation(user) not in _SUMS or (operation(user) in _KEPT and _is_used(Value(user, 0), consumers))
        for user in users
    )


def _is_sum(node: Node, parents: list[Value]) -> bool:
    """Whether a sum is one of parts apart, and a product or a quotient has one variable, the first of a quotient.

    Logits less their logsumexp are one expression: one part is made of the other.
    """
    if operation(node) in ("Add", "Sub", "Rsub") and len(parents) == 2:
        one, two = parents[0].node, parents[1].node
        return one is two or (one not in nodes_from(two) and two not in nodes_from(one))
    if operation(node) not in ("Mul", "Div"):
        return True
    return len(parents) == 1 and not (operation(node) == "Div" and node.next_functions[0][0] is None)


def _weighs(node: Any) -> bool:
    """Whether an operation multiplies by a number of its own for each sample: no mask, no class, no probability.

    Ones and zeros for each sample are labels of pairs, or rewards: of likelihoods they are the latter.
    """
    if operation(node) not in ("Mul", "Div"):
        return False
    saved = node._saved_self if node.next_functions[0][0] is None else getattr(node, "_saved_other", None)
    if not isinstance(saved, Tensor) or saved.numel() < 2 or not saved.is_floating_point():
        return False
    saved = saved.detach()
    if bool(((saved == 0) | (saved == 1)).all()):
        likelihood = any(operation(each) in _LIKELIHOODS for each in nodes_from(node))
        return saved.squeeze().dim() < 2 and likelihood and bool((saved != saved.flatten()[0]).any())
    if saved.squeeze().dim() < 2 or bool((saved < 0).any()):
        return bool((saved != saved.flatten()[0]).any())
    shares = bool((saved <= 1).all())
    return not shares and bool(((saved.sum(-1) - 1).abs() > _NORMALISED).any())


def _factor(node: Node) -> tuple[tuple[Tensor, ...], Value | None]:
    """The parameters that make one factor of a product by themselves, scalars and vectors, and the other factor."""
    parents = [Value(parent, number) for parent, number in node.next_functions if parent is not None]
    if operation(node) not in ("Mul", "Div") or len(parents) != 2:
        return (), None
    for one, other in (parents, parents[::-1]):
        found, rest = _leaves(one), _leaves(other)
        if found and _are_small(found) and not _are_small(rest):
            return tuple(leaf for leaf in found if leaf is not None), other
    return (), None


def _leaves(value: Value) -> list[Tensor | None]:
    return [getattr(node, "variable", None) for node in nodes_from(value.node) if not node.next_functions]


def _are_small(leaves: list[Tensor | None]) -> bool:
    """Whether these are parameters, and none is a matrix."""
    return all(isinstance(leaf, nn.Parameter) and leaf.dim() < 2 for leaf in leaves)


def is_linear_in(scalar: Tensor, output: Any) -> bool:
    """Whether a loss is a weighted sum of outputs of several features each, as a critic's is, or one to try things."""
    tensors = [tensor for _, tensor in named_tensors(output) if tensor.requires_grad]
    ends = {value_of(t) for t in tensors if t.dim() > 1}
    stack, seen = [value_of(scalar)], set[Value]()
    while stack:
        value = stack.pop()
        if value in seen or value in ends:
            continue
        seen.add(value)
        parents = [Value(parent, number) for parent, number in value.node.next_functions if parent is not None]
        if operation(value.node) not in _SUMS or not _is_sum(value.node, parents):
            return False
        stack += parents
    return True


def through_another_net(scalar: Tensor, parameters: set[int]) -> bool:
    """Whether a loss is taken behind matrices that are not trained with the model: a critic's, a judge's.

    Args:
        scalar: the loss, on the graph.
        parameters: ids of those that are trained.
    """
    trained: dict[Node, bool] = {}

    def reached(node: Node) -> bool:
        if node not in trained:
            leaves = (each for each in nodes_from(node) if hasattr(each, "variable"))
            trained[node] = any(id(leaf.variable) in parameters for leaf in leaves)
        return trained[node]

    for node in nodes_above(scalar):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in parameters and leaf.dim() > 1:
            return True
        if operation(node) in MATRICES:
            parents = [parent for parent, _ in node.next_functions]
            factors = parents[-2:] if operation(node) in ("Addmm", "Mm", "Bmm", "Baddbmm", "Mv", "Dot") else parents[:2]
            given = [f for f in factors if f is not None and not _is_parameter(f)]  # the first layer has data and those
            if any(f is None for f in factors) and any(reached(f) for f in given):
                return True
    return False


def _is_parameter(node: Node) -> bool:
    end = behind_moves(node)
    return end is not None and hasattr(end, "variable")
