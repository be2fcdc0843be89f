"""How the weight of the input of a linear recurrence goes with the factor of its state: h' = a h + w u.

Made of one step size h, both say which method was meant: a = 1 - h A with w = h B is explicit Euler; w = (a - 1) / A is
the exact step for an input that is held (ZOH); w = sqrt(1 - |a|^2) keeps the variance of a state that white noise
drives, as the exact step of a process of Ornstein and Uhlenbeck does.

Explicit Euler is told from the operations alone, by the degree in h of what a time step makes: h' is the old state and
something that is homogeneous of degree one in h, which every term then has as a factor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES
from stabkit.tracing.graph.values import Value, meta_of, operation

SAVED: Mapping[str, dict[int, str]] = {  # of the products: where they keep which of their arguments
    "Mul": {0: "_saved_self", 1: "_saved_other"},
    "Div": {0: "_saved_self", 1: "_saved_other"},
    "Mm": {0: "_saved_self", 1: "_saved_mat2"},
    "Bmm": {0: "_saved_self", 1: "_saved_mat2"},
    "Addmm": {1: "_saved_mat1", 2: "_saved_mat2"},
    "Baddbmm": {1: "_saved_batch1", 2: "_saved_batch2"},
    "Lerp": {0: "", 2: "_saved_weight"},
}
_MADE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Mul": torch.mul, "Div": torch.div, "Mm": torch.mm, "Bmm": torch.bmm,
}  # fmt: skip
_ROUNDINGS = 100.0  # multiple of the rounding unit by which two ways to make one number may differ
_MOST = 24  # values that may be the step size: those that are factors on the way to the new state
_FREE, _STATE, _STEP, _ONE_AND_STEP, _STATE_AND_STEP, _OTHER = range(6)  # degrees in h


def weight_of_input(added: Sequence[Value], factor: Tensor) -> str:
    """``"held"`` or ``"variance"``, where the weight of an input has the factor a - 1 or sqrt(1 - |a|^2); else ``""``.

    Args:
        added: what is added to the state.
        factor: what multiplies the state, a.
    """
    known = {"held": 1 - factor}
    if bool((factor.abs() <= 1).all()):
        known["variance"] = (1 - factor.abs() ** 2).sqrt()
    for number in (n for value in added for n in _factors(value)):
        for name, weight in known.items():
            if _equal(number, weight) or _equal(-number, weight):
                return name
    return ""


def weighs(value: Value, weight: Tensor) -> bool:
    """Whether a value is a product one of whose factors is a given number for every entry."""
    return any(_equal(number, weight, broadcast=False) for number in _factors(value, nested=False))


def _factors(value: Value, *, nested: bool = True) -> Iterator[Tensor]:
    """The numbers of a product, taken at the place at which the value is taken of it, the outermost first."""
    stack: list[tuple[Value, list[tuple[int, int]]]] = [(value, [])]
    while stack:
        found, selected = stack.pop()
        node = found.node
        name, parents = operation(node), node.next_functions
        first = next((Value(parent, output) for parent, output in parents[:1] if parent is not None), None)
        if name in MOVES and first is not None:
            at: Any = node
            if name in ("Select", "Unbind"):
                selected = [*selected, (at._saved_dim, at._saved_index if name == "Select" else found.output)]
            stack.append((first, selected))
        elif name == "Neg" and nested and first is not None:
            stack.append((first, selected))
        elif name == "Mul" or (nested and name in ("Div", "Mm", "Bmm")):
            for place, saved in SAVED[name].items():
                number, (parent, output) = getattr(node, saved, None), parents[place]
                if isinstance(number, Tensor) and not (name == "Div" and place):
                    yield _selected(number.detach(), selected)
                if nested and parent is not None and not (name == "Div" and place):
                    stack.append((Value(parent, output), selected if name in ("Mul", "Div") else []))


def _selected(number: Tensor, selected: Sequence[tuple[int, int]]) -> Tensor:
    for axis, index in reversed(selected):
        if axis < number.dim() and index < number.shape[axis]:
            number = number.select(axis, index)
    return number


def _equal(number: Tensor, weight: Tensor, *, broadcast: bool = True) -> bool:
    """Whether two tensors are the same numbers, entry by entry, or one is those of the other along its last axes."""
    if number.is_complex() != weight.is_complex():
        return False
    if number.numel() not in (weight.numel(), 1):
        shapes = number.shape, weight.shape
        if not broadcast or any(a not in (b, 1) and b != 1 for a, b in zip(*(s[::-1] for s in shapes), strict=False)):
            return False
        number, weight = number + torch.zeros_like(weight), weight + torch.zeros_like(number)
    difference = (number.reshape(-1) - weight.reshape(-1)).abs()
    return bool((difference <= _ROUNDINGS * torch.finfo(weight.dtype).eps).all())


@dataclass(frozen=True, eq=False)
class _TimeStep:
    """The operations between two states.

    Attributes:
        before: the values of the state before.
        after: that of the state after.
        carried: what is made of the state before on the way.
        elsewhere: values that must not be read: the state before a decay.
    """

    before: frozenset[Value]
    after: Value
    carried: frozenset[Node]
    elsewhere: frozenset[Value] = frozenset()


def explicit_step(before: Collection[Value], after: Value, cycle: Sequence[Node]) -> tuple[str, Value | None]:
    """``"step"`` for h' = h + dt (A h + B u), with dt; ``"decay"`` where h is multiplied first; ``""`` for others.

    A step size that is a constant of the code is given as its product with the field.

    Args:
        before: the values of the state before.
        after: that of the state after, one tensor.
        cycle: the operations on the way of the state.
    """
    step = _TimeStep(frozenset(before), after, frozenset(cycle))
    if (size := _step_size(step)) is not None:
        return "step", size
    for node in cycle:
        given = [None if parent is None else Value(parent, output) for parent, output in node.next_functions]
        states = [v for v in given if v is not None and stripped(v) in step.before]
        if operation(node) == "Mul" and len(states) == 1 and after.node is not node:
            decayed = _TimeStep(frozenset({Value(node, 0)}), after, step.carried - {node}, step.before)
            size = _step_size(decayed)
            return "" if size is None else "decay", size
    return "", None


def stripped(value: Value) -> Value:
    """What a value is made of by moves alone."""
    while operation(value.node) in MOVES:
        parent, output = value.node.next_functions[0]
        if parent is None:
            break
        value = Value(parent, output)
    return value


def _step_size(step: _TimeStep) -> Value | None:
    """The step size, or its product with the field; None where there is none, or no field reads the state."""
    if all(operation(node) in MOVES | ADDS for node in step.carried):
        return None
    return next((value for value in _candidates(step) if _is_step_size(step, value)), None)


def _candidates(step: _TimeStep) -> list[Value]:
    """The values that are factors on the way to the new state, and nothing of the old one; the nearest first."""
    found: dict[Value, None] = {}
    row, seen = deque([step.after]), set[Value]()
    while row and len(found) < _MOST:
        value = row.popleft()
        if value in seen or value in step.before or value in step.elsewhere:
            continue
        seen.add(value)
        name = operation(value.node)
        parents = value.node.next_functions
        is_product = name == "Mul" and any(parent is None for parent, _ in parents)  # with a constant
        if (is_product or (value.node not in step.carried and name not in MOVES | ADDS)) and value != step.after:
            found[value] = None
        if name in MOVES | ADDS or name in SAVED or name == "Neg":
            row += [Value(parent, output) for parent, output in parents if parent is not None]
    return list(found)


def _is_step_size(step: _TimeStep, h: Value) -> bool:
    """Whether the new state is the old one and something of degree one in a value."""
    if operation(h.node) == "Expm1" or h in step.before:
        return False  # e^z - 1 is a factor of the exact step
    degrees: dict[Value, int] = dict.fromkeys(step.before, _STATE)
    degrees |= dict.fromkeys(step.elsewhere, _OTHER)
    degrees[h] = _STEP
    stack = [step.after]
    while stack:
        value = stack[-1]
        if value in degrees:
            stack.pop()
            continue
        parents = [None if parent is None else Value(parent, output) for parent, output in value.node.next_functions]
        missing = [v for v in parents if v is not None and v not in degrees and _may_hold(v, step, h)]
        if missing:
            stack += missing
            continue
        stack.pop()
        degrees[value] = _degree(value.node, [None if v is None else degrees.get(v, _FREE) for v in parents])
    return degrees[step.after] == _STATE_AND_STEP


def _may_hold(value: Value, step: _TimeStep, h: Value) -> bool:
    """Whether a value can be made of h or of the state: nothing older than both is."""
    first = min(v.node._sequence_nr() for v in (h, *step.before))
    return value.node._sequence_nr() > first


def _degree(node: Node, given: Sequence[int | None]) -> int:
    """The degree in h of what an operation makes of values of some degrees; None stands for a constant."""
    kinds = [_FREE if k is None else k for k in given]
    present, name = set(kinds), operation(node)
    if not present or present == {_FREE} or (present <= {_FREE, _STATE} and name not in MOVES | ADDS):
        return _FREE
    if _OTHER in present:
        return _OTHER
    if name in MOVES or name == "Neg":
        return kinds[0] if len(present) == 1 and not (name == "Neg" and kinds[0] >= _ONE_AND_STEP) else _OTHER
    if name in ADDS:
        return _of_sum(node, given, present)
    if name in ("Addmm", "Baddbmm", "Addcmul"):
        product = _of_product(node, kinds[1:])
        return {
            (_STATE, _STEP): _STATE_AND_STEP, (_STATE_AND_STEP, _STEP): _STATE_AND_STEP, (_STEP, _STEP): _STEP,
            (_STEP, _STATE_AND_STEP): _STATE_AND_STEP, (_FREE, _FREE): _FREE,
        }.get((kinds[0], product), _OTHER)  # fmt: skip
    if name == "Div":
        return kinds[0] if kinds[1] == _FREE and kinds[0] == _STEP else _OTHER
    if name in ("Mul", "Mm", "Bmm", "Mv", "Dot"):
        return _of_product(node, kinds)
    return _STEP if name in ("Sum", "Mean") and present == {_STEP} else _OTHER


def _of_product(node: Node, kinds: Sequence[int]) -> int:
    if _OTHER in kinds:
        return _OTHER
    if set(kinds) <= {_FREE, _STATE}:
        return _FREE
    if sorted(kinds) in ([_FREE, _STEP], [_STATE, _STEP]):
        return _STEP
    if sorted(kinds) == [_STATE, _ONE_AND_STEP] and _is_one_and_step(node, kinds.index(_ONE_AND_STEP)):
        return _STATE_AND_STEP
    return _OTHER


def _of_sum(node: Node, given: Sequence[int | None], present: set[int]) -> int:
    if None in given or len(given) == 1:  # a constant and h A: whether it is one is seen where it multiplies the state
        return _ONE_AND_STEP if [k for k in given if k is not None] == [_STEP] else _OTHER
    negative = operation(node) == "Rsub", operation(node) == "Sub"  # which argument loses its sign
    states = [i for i, k in enumerate(given) if k in (_STATE, _STATE_AND_STEP)]
    if present == {_STEP}:
        return _STEP
    if len(states) == 1 and len(given) == 2 and present <= {_STATE, _STATE_AND_STEP, _STEP}:
        return _OTHER if negative[states[0]] or getattr(node, "_saved_alpha", 1) not in (1, None) else _STATE_AND_STEP
    return _FREE if present <= {_FREE, _STATE} else _OTHER  # h + u is no state to which a step is added


def _is_one_and_step(node: Node, place: int) -> bool:
    """Whether a factor of the state is 1 (the identity) and what it was told to be of degree one, by the numbers."""
    places = SAVED.get(operation(node), {})
    at = sorted(places)[place]
    number, (parent, output) = getattr(node, places[at], None), node.next_functions[at]
    if not isinstance(number, Tensor) or parent is None:
        return False
    whole = stripped(Value(parent, output))
    inner = next(Value(p, o) for p, o in whole.node.next_functions if p is not None)
    size, step = _product_of(stripped(inner)), stripped(inner)
    if size is None:
        return False
    number, meta = number.detach(), meta_of(Value(parent, output))
    is_matrix = operation(node) != "Mul"
    one = (
        torch.eye(number.shape[-1], dtype=number.dtype, device=number.device) if is_matrix else torch.ones_like(number)
    )
    w = torch.randn(number.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(number)
    (pulled,) = torch.autograd.grad([Value(parent, output).edge], [step.edge], [w.to(meta.dtype).expand(meta.shape)],
                                    retain_graph=True)  # fmt: skip
    ours, theirs = (pulled.conj() * size).sum().real, (w.conj() * (number - one)).sum().real
    largest = float((w.abs() * ((number - one).abs() + 1)).sum())
    return float((ours - theirs).abs()) <= _ROUNDINGS * torch.finfo(number.dtype).eps * largest


def _product_of(value: Value) -> Tensor | None:
    """The number of a value that is a product, whose factors the operation keeps; None where it does not."""
    name = operation(value.node)
    kept = [getattr(value.node, saved, None) for saved in SAVED.get(name, {}).values()] if name in _MADE else []
    first, second = (*kept, None, None)[:2]
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    return _MADE[name](first.detach(), second.detach())
