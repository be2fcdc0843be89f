"""Hand-written ``torch.autograd.Function``s of a pass: what they were called with, and what their backward says.

A backward is linear in what comes back to it, and is the derivative of its forward. Both are tried on a copy of the
arguments in float64. Many backwards are something else on purpose (straight through a rounding, reversed, clipped, a
surrogate of a step); which of these is a fault is for others to judge.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from stabkit.tracing.recording.randomness import seeded, unchanged_randomness
from stabkit.tracing.recording.recorder import clock

LARGEST = 1_000_000  # numbers in the arguments of a call beyond which it is not tried
_STEP = 1e-6  # of central differences in float64, whose error is then about 1e-10, relative
_CLOSE = 1e-4  # relative error of a difference quotient from which a forward is not smooth there
_EXACT = 1e-6  # relative error in float64 of what is linear
# what running a function of a user's on other numbers may raise: it may not know float64, or not this stand-in
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError)


@dataclass
class FunctionCall:
    """One call of a function.

    Attributes:
        number: that of its node.
        function: its class.
        args: what it was called with; its tensors are copies.
        wanted: for each tensor among the arguments, in their order, whether it required grad.
    """

    number: int
    function: type[Function]
    args: tuple[Any, ...]
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class Probe:
    """What a backward does. Lists have an entry for every argument that required grad and that the result moves with.

    Attributes:
        outputs: numbers in the result.
        ignoring: largest share of what it puts out that comes even where nothing comes back to it.
        linear: whether it is linear in what comes back to it.
        sent: what was sent back.
        given: what it made of that.
        true: the derivative, applied to the same; None where the forward is not smooth, or cannot be differentiated.
    """

    outputs: int
    ignoring: float
    linear: bool
    sent: list[Tensor]
    given: list[Tensor]
    true: list[Tensor] | None


def own_functions(nodes: Sequence[Node]) -> dict[type[Function], list[Node]]:
    """The hand-written functions of a graph with their nodes, but for those that torch brings."""
    found: dict[type[Function], list[Node]] = {}
    for node in nodes:
        kind: Any = type(node)
        if issubclass(kind, BackwardCFunction):
            written: Any = getattr(kind, "_forward_cls", None)
            if written is not None and not written.__module__.startswith("torch."):
                found.setdefault(written, []).append(node)
    return found


@dataclass
class Calls:
    """The calls of some functions, while they are watched.

    Attributes:
        made: by the number of their nodes.
    """

    made: dict[int, FunctionCall] = field(default_factory=dict)


@contextlib.contextmanager
def watched(functions: Sequence[type[Function]]) -> Iterator[Calls]:
    """Keep what functions are called with, however a model reaches their ``apply``."""
    calls = Calls()
    own = {each: each.__dict__.get("forward") for each in functions}
    try:
        for each in functions:
            each.forward = staticmethod(_keeping(each, each.forward, calls))  # type: ignore[method-assign]
        yield calls
    finally:
        for each, forward in own.items():
            if forward is None:
                del each.forward
            else:
                each.forward = forward  # type: ignore[method-assign]


def _keeping(function: type[Function], forward: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    takes_context = _takes_context(function)

    def kept(*args: Any, **kwargs: Any) -> Any:
        number = clock() - 1
        given = args[1:] if takes_context else args
        tensors = [a for a in tree_leaves(given) if isinstance(a, Tensor)]
        if sum(t.numel() for t in tensors) <= LARGEST:
            copies = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, given)
            wanted = tuple(t.requires_grad for t in tensors)
            calls.made[number] = FunctionCall(number, function, copies, wanted)
        return forward(*args, **kwargs)

    return kept


def _takes_context(function: type[Function]) -> bool:
    """Whether the forward is given the context; newer ones have ``setup_context`` for it."""
    return inspect.getattr_static(function, "setup_context") is inspect.getattr_static(Function, "setup_context")


class _Context:
    """Stands in for the context of a forward that runs on the graph itself."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(wanted)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        pass

    def mark_dirty(self, *tensors: Any) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def plain_forward(call: FunctionCall, args: tuple[Any, ...]) -> list[Tensor]:
    """The float tensors that the forward makes, by operations that autograd sees, if it is made of such."""
    forward: Any = call.function.forward
    given = (_Context(call.wanted), *args) if _takes_context(call.function) else args
    return _floats(forward(*given))


def true_derivative(call: FunctionCall, sent: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """What the backward of a call should make of what comes back: for each tensor among its arguments; None unknown."""
    args, tensors, leaves = _copied(call, None)
    try:
        with unchanged_randomness(), torch.enable_grad():
            made = plain_forward(call, args)
            pairs = [(out, g) for out, g in zip(made, sent, strict=True) if g is not None and out.requires_grad]
            if not pairs or not leaves:
                return None
            outs, back = [out for out, _ in pairs], [g for _, g in pairs]
            found = torch.autograd.grad(outs, leaves, back, allow_unused=True)
    except _REFUSALS:
        return None
    by_leaf = {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}
    return [by_leaf.get(id(t)) for t in tensors]


def probed(call: FunctionCall) -> Probe | None:
    """What the backward of a call does; None where it cannot be tried on a copy, or is not the same twice."""
    try:
        with unchanged_randomness(), torch.enable_grad():
            return _probed(call)
    except _REFUSALS:
        return None


def _probed(call: FunctionCall) -> Probe | None:
    generator = torch.Generator().manual_seed(0)
    args, _, leaves = _copied(call, torch.float64)
    if not leaves:
        return None
    seeded(0)
    outs = [out for out in _floats(call.function.apply(*args)) if out.requires_grad]
    if not outs or any(out.dtype != torch.float64 for out in outs):
        return None
    scalar = all(out.numel() == 1 for out in outs)

    def drawn() -> list[Tensor]:
        return [
            torch.ones_like(out)  # what comes back to a loss
            if scalar
            else torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
            for out in outs
        ]

    def back(sent: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(outs, leaves, [s.clone() for s in sent], retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

    one, other = drawn(), drawn()
    given, again = back(one), back(one)
    if not all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(given, again, strict=True)):
        return None
    nothing = back([torch.zeros_like(s) for s in one])
    both = back([a + b for a, b in zip(one, other, strict=True)])
    parts = zip(both, given, back(other), nothing, strict=True)
    linear = all(_near(sum_, a + b - none, _EXACT) for sum_, a, b, none in parts)
    moves = _moving(call, args, leaves, outs, generator)
    kept = [i for i, moved in enumerate(moves) if moved]
    if not kept:
        return None
    ignoring = max(_share(nothing[i], given[i]) for i in kept)
    true = _true(call, one, args, leaves, outs, generator)
    return Probe(
        outputs=max(out.numel() for out in outs),
        ignoring=ignoring,
        linear=linear,
        sent=one,
        given=[given[i] for i in kept],
        true=None if true is None else [true[i] for i in kept],
    )


def _true(
    call: FunctionCall,
    sent: Sequence[Tensor],
    args: tuple[Any, ...],
    leaves: Sequence[Tensor],
    outs: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor] | None:
    """The derivative of the forward's own operations, where difference quotients say the same."""
    seeded(0)
    made = plain_forward(call, args)
    if len(made) != len(outs) or not all(_near(a, b, _EXACT) for a, b in zip(made, outs, strict=True)):
        return None
    made = [out if out.requires_grad else out + 0 * sum(leaf.sum() for leaf in leaves) for out in made]
    found = torch.autograd.grad(made, list(leaves), list(sent), allow_unused=True)
    true = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    along = [_direction(leaf, generator) for leaf in leaves]
    ends = [_at(call, args, leaves, along, step) for step in (1.0, -1.0)]
    quotient = [(a - b) / (2 * _STEP) for a, b in zip(*ends, strict=True)]
    measured = sum(float((s * q).sum()) for s, q in zip(sent, quotient, strict=True))
    told = sum(float((t * d).sum()) for t, d in zip(true, along, strict=True))
    size = sum(float((s.abs() * q.abs()).sum()) for s, q in zip(sent, quotient, strict=True))
    return true if abs(measured - told) <= _CLOSE * max(size, abs(told)) else None


def _moving(
    call: FunctionCall,
    args: tuple[Any, ...],
    leaves: Sequence[Tensor],
    outs: Sequence[Tensor],
    generator: torch.Generator,
) -> list[bool]:
    """Whether the result changes with each leaf; one that it does not depend on may carry a loss of its own."""
    found = []
    for i, leaf in enumerate(leaves):
        along = [_direction(leaf, generator) if j == i else torch.zeros_like(other) for j, other in enumerate(leaves)]
        changed = _at(call, args, leaves, along, 1e3)
        found.append(any(not torch.equal(a, b.detach()) for a, b in zip(changed, outs, strict=True)))
    return found


def _direction(leaf: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
    return drawn * max(1.0, float(leaf.detach().square().mean().sqrt()) if leaf.numel() else 1.0)


def _at(
    call: FunctionCall, args: tuple[Any, ...], leaves: Sequence[Tensor], along: Sequence[Tensor], steps: float
) -> list[Tensor]:
    """The result beside the arguments."""
    moved = {id(leaf): leaf.detach() + steps * _STEP * direction for leaf, direction in zip(leaves, along, strict=True)}
    given = tree_map(lambda a: moved.get(id(a), a.detach().clone()) if isinstance(a, Tensor) else a, args)
    seeded(0)
    with torch.no_grad():
        return [out.detach() for out in plain_forward(call, given)]


def _copied(call: FunctionCall, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], list[Tensor], list[Tensor]]:
    """Copies of the arguments, of their tensors, and of those that required grad, which are leaves."""
    flags: Mapping[int, bool] = {
        id(t): wanted
        for t, wanted in zip((a for a in tree_leaves(call.args) if isinstance(a, Tensor)), call.wanted, strict=True)
    }
    tensors: list[Tensor] = []

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fresh = value.detach().clone()
        if dtype is not None and value.is_floating_point():
            fresh = fresh.to(dtype)
        tensors.append(fresh.requires_grad_(flags[id(value)]))
        return fresh

    args = tree_map(copied, call.args)
    return args, tensors, [t for t in tensors if t.requires_grad]


def _floats(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def _near(one: Tensor, other: Tensor, relative: float) -> bool:
    one, other = one.detach(), other.detach()
    return float((one - other).norm()) <= relative * max(float(one.norm()), float(other.norm()), 1e-300)


def _share(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size > 0 else float(bool((part != 0).any()))
