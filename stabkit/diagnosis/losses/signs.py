"""Which ends a loss has for sure, read off the operations that make it: squares, norms and likelihoods end at zero.

Of what is not known no end is known: that a loss may fall without end is then for a trial to show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.losses.ranges import range_of
from stabkit.tracing.graph.values import operation
from stabkit.vocabulary import activation_of, moves

_MOVES = moves()
_SUMS = frozenset({"Sum", "Mean", "Cumsum", "Max", "Min", "Amax", "Amin", "Median", "MaxPool2DWithIndices"})
_NEVER_NEGATIVE = frozenset(
    {"MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "Abs", "Norm", "LinalgVectorNorm", "Exp", "Sqrt", "CtcLoss"}
    | {"SoftMarginLoss", "Cdist", "Std", "Var", "Softmax", "Cosh"}
)
_NEVER_POSITIVE = frozenset({"LogSoftmax"})
_BETWEEN = frozenset({"Sin", "Cos", "CosineSimilarity"})
_DEEPEST = 200  # operations from the loss down that are followed


@dataclass(frozen=True)
class Signs:
    """What is known of every entry of a value.

    Attributes:
        below: whether there is a number that none is below.
        above: whether there is one that none is above.
        positive: whether none is below zero.
        negative: whether none is above zero.
    """

    below: bool = False
    above: bool = False
    positive: bool = False
    negative: bool = False

    def turned(self) -> Signs:
        """Of the negative."""
        return Signs(self.above, self.below, self.negative, self.positive)


_UNKNOWN = Signs()
_POSITIVE = Signs(below=True, positive=True)
_BOUNDED = _CONSTANT = Signs(below=True, above=True)


def signs_of(node: Node | None, known: dict[Node, Signs] | None = None, depth: int = 0) -> Signs:
    """What the operations that make a value say of its sign and its ends; of what is no variable, that it is bounded.

    Args:
        node: what made the value; None for a constant.
        known: what was found of other nodes.
        depth: operations that were followed so far.
    """
    known = {} if known is None else known
    if node is None:
        return _CONSTANT
    if node not in known:
        known[node] = _UNKNOWN if depth > _DEEPEST else _signs(node, known, depth + 1)
    return known[node]


def is_never_negative(loss: Tensor) -> bool:
    """Whether the operations that make a scalar say that it is never below zero, also after its backward pass.

    That pass frees constants. One that is multiplied in last is positive where the loss and what it multiplies are.
    """
    node: Any = loss.grad_fn
    while node is not None and operation(node) in ("Mul", "Div"):
        inner = [parent for parent, _ in node.next_functions if parent is not None]
        if len(inner) != 1 or float(loss.detach()) <= 0.0:
            break
        node = inner[0]
    return node is not None and signs_of(node).positive


def _kept(node: Any, name: str) -> Any:
    """What an operation has saved; None where its backward pass was made, which frees tensors."""
    try:
        return getattr(node, name, None)
    except RuntimeError:
        return None


def _signs(node: Any, known: dict[Node, Signs], depth: int) -> Signs:
    name = operation(node)
    inner = [signs_of(parent, known, depth) for parent, _ in node.next_functions] if name in _FOLLOWED else []
    if name in _MOVES or name in _SUMS:
        return _all(inner)
    if name == "Neg":
        return inner[0].turned()
    if name in ("Add", "Sub", "Rsub"):
        return _sum(node, name, inner)
    if name in ("Mul", "Div"):
        return _product(node, name, inner)
    if name == "Pow":
        power = _kept(node, "_saved_exponent")  # a tensor where each entry has its own
        return _POSITIVE if isinstance(power, int | float) and power % 2 == 0 else _UNKNOWN
    if name in ("Maximum", "Minimum"):
        return _of_two(name, *inner)
    if name == "Where":
        return _all(inner)
    return _single(node, name, known, depth)


_FOLLOWED = frozenset({"Neg", "Add", "Sub", "Rsub", "Mul", "Div", "Maximum", "Minimum", "Where"}) | _MOVES | _SUMS


def _single(node: Any, name: str, known: dict[Node, Signs], depth: int) -> Signs:
    """Of operations that have ends of their own."""
    if name in ("NllLoss", "NllLoss2D", "Gather", "Index"):
        signs = signs_of(node.next_functions[0][0], known, depth)
        return signs.turned() if name.startswith("Nll") else signs
    if name.startswith("BinaryCrossEntropy"):
        targets = _kept(node, "_saved_target")  # freed, they are taken for what they should be
        inside = targets is None or bool(((targets >= 0) & (targets <= 1)).all())
        return _POSITIVE if inside else _UNKNOWN
    if name in _NEVER_NEGATIVE:
        return Signs(below=True, positive=True, above=name == "Softmax")
    if name in _NEVER_POSITIVE:
        return _POSITIVE.turned()
    if name in _BETWEEN:
        return _BOUNDED
    if name.startswith("Clamp"):
        held = range_of(node)
        return Signs(held.low > -math.inf, held.high < math.inf, held.low >= 0, held.high <= 0)
    facts = activation_of(node)
    if facts is None or facts.slope[0] < 0:
        return _UNKNOWN
    low, high = facts.limits
    return Signs(abs(low) < math.inf, abs(high) < math.inf, low >= 0, high <= 0)


def _all(inner: list[Signs]) -> Signs:
    if not inner:
        return _UNKNOWN
    return Signs(*(all(getattr(each, end) for each in inner) for end in ("below", "above", "positive", "negative")))


def _sum(node: Any, name: str, inner: list[Signs]) -> Signs:
    one, two = (inner[0], inner[1] if len(inner) > 1 else _CONSTANT)
    if name == "Rsub":  # other - self
        one, two = two, one
    if float(getattr(node, "_saved_alpha", 1)) * (1 if name == "Add" else -1) < 0:
        two = two.turned()
    return _all([one, two])


def _product(node: Any, name: str, inner: list[Signs]) -> Signs:
    parents = [parent for parent, _ in node.next_functions]
    if name == "Mul" and len(parents) == 2 and parents[0] is not None and parents[0] is parents[1]:
        return _POSITIVE
    one = inner[0] if parents[0] is not None else _of_constant(_kept(node, "_saved_self"))
    variable = len(parents) > 1 and parents[1] is not None
    two = inner[1] if variable else _of_constant(_kept(node, "_saved_other"))
    positive = (one.positive and two.positive) or (one.negative and two.negative)
    negative = (one.positive and two.negative) or (one.negative and two.positive)
    if name == "Div" and variable:
        return Signs(positive, negative, positive, negative)
    bounded = one.below and one.above and two.below and two.above
    return Signs(bounded or positive, bounded or negative, positive, negative)


def _of_constant(saved: Any) -> Signs:
    if isinstance(saved, Tensor):
        return Signs(True, True, bool((saved >= 0).all()), bool((saved <= 0).all()))
    if isinstance(saved, int | float):
        return Signs(True, True, saved >= 0, saved <= 0)
    return _CONSTANT


def _of_two(name: str, one: Signs, two: Signs) -> Signs:
    """Of the larger or the smaller of two: the larger has each lower end of either."""
    below, above = (any, all) if name == "Maximum" else (all, any)
    return Signs(
        below((one.below, two.below)),
        above((one.above, two.above)),
        below((one.positive, two.positive)),
        above((one.negative, two.negative)),
    )
