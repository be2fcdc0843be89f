"""Operations of the model's code that sum many terms and divide by nothing: neighbours of a node, entries of an axis.

A sum over N neighbours is up to N times as large as its terms, whatever the weights are, and layers of it multiply
this. What it is without is measured: the same code runs with every such result divided by what it makes of ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.errors import StabkitError
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.recorder import Recording, recording_calls
from stabkit.tracing.recording.training_pass import calling_line
from stabkit.vocabulary import activation_of, moves

_PRODUCTS = frozenset({"matmul", "rmatmul", "mm", "bmm", "einsum", "spmm", "smm", "sparse_mm", "tensordot"})
_SCATTERS = frozenset({"index_add", "scatter_add"})
_DIVIDES = frozenset({"div", "truediv", "divide", "true_divide", "mul", "multiply"})
_MADE_OF_IT = frozenset({"sqrt", "rsqrt", "reciprocal", "log", "pow", "exp", "rtruediv"})
#: what leaves a weight one, where no other tensor that is trained comes to it: a view, a mask, a softmax
_OF_WEIGHTS = moves("reshape", "permute", "copy", "select") | {"Mul", "Div", "Exp", "Softmax"}
_GROWS = 3.0  # times its size that a state leaves an operation with, from which it is one to try
_NAMES = {"rmatmul": "matmul", "truediv": "div"}

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Summing:
    """One line of code that sums.

    Attributes:
        name: the name of the function.
        line: file and line.
        path: the module that it runs in, ``""`` for the outermost.
        fixed: the place of the operand that no parameter makes, among the arguments; -1 for a sum alone.
        terms: how many terms an entry of its result is made of, on average; of an operand of both signs, what it
            multiplies unrelated entries by.
        signed: whether the fixed operand has both signs.
        gain: the size of the result over that of the state, the largest of its calls.
        calls: how often it ran.
    """

    name: str
    line: str
    path: str
    fixed: int
    terms: float
    signed: bool
    gain: float
    calls: int = 1

    @property
    def place(self) -> str:
        """Function, module and line, in words."""
        return f"{self.name} in {self.path or 'the code of the model'}" + (f" ({self.line})" if self.line else "")


def summing_operations(call: ForwardPass) -> list[Summing]:
    """The lines of a model that make a state three times as large by a sum or a fixed operand, and never divide it.

    What divides, or takes roots of, the result is another matter: a mean, a norm, a softmax.
    """
    watch = _Watch()
    try:
        with call.kept(), torch.enable_grad(), recording_calls(call.module, watch.recording), watch:
            call.called()
    except (StabkitError, RuntimeError):
        return []
    found: dict[tuple[str, str, int], Summing] = {}
    for key, each in watch.found.items():
        if key in watch.divided:
            continue
        same = found.get((each.name, each.line, each.fixed))
        found[each.name, each.line, each.fixed] = each if same is None else _joined(same, each)
    settled = {(e.name, e.line) for k, e in watch.found.items() if k in watch.divided}
    return [each for each in found.values() if (each.name, each.line) not in settled]


def _joined(one: Summing, other: Summing) -> Summing:
    terms = (one.terms * one.calls + other.terms) / (one.calls + 1)
    gain = max(one.gain, other.gain)
    return Summing(one.name, one.line, one.path, one.fixed, terms, one.signed, gain, one.calls + 1)


class _Watch(FunctionCalls):
    """Notes what sums, by the result that it makes, and which results are divided later."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.found: dict[int, Summing] = {}
        self.divided: set[int] = set()
        self._kept: list[Tensor] = []  # an id is that of one tensor while that is alive

    def _called(self, func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        given = [a for a in args if isinstance(a, Tensor)]
        if name in _MADE_OF_IT and given:
            self.divided.add(id(given[0]))
        elif name in _DIVIDES:
            free = [a for a in given if not a.requires_grad]
            self.divided.update(id(a) for a in given if "mul" not in name or len(free) + 1 >= len(given))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.requires_grad:
            read = _read(name, func, args, kwargs, result)
            if read is not None:
                fixed, terms, signed, gain = read
                place, path = calling_line(), self.recording.running
                self.found[id(result)] = Summing(_NAMES.get(name, name), place, path, fixed, terms, signed, gain)
                self._kept.append(result)
        return result


def _read(
    name: str, func: Any, args: Arguments, kwargs: dict[str, Any], result: Tensor
) -> tuple[int, float, bool, float] | None:
    """Place of the fixed operand, terms, signs and gain of a call that grows a state; None for another."""
    state, fixed, signed = _operands(name, args)
    if state is None or state.numel() < 2:
        return None
    with torch.no_grad():
        gain = _rms(result) / max(_rms(state), 1e-30)
        if not _GROWS <= gain < math.inf:
            return None
        if name in _PRODUCTS and signed:
            made = func(*_with(args, fixed, torch.square(args[fixed]), torch.ones_like(state)), **kwargs)
            return fixed, float(made.mean().sqrt()), True, gain
        terms = _terms(name, func, args, kwargs, fixed, state, result)
        return None if terms is None else (fixed, float(terms.mean()), False, gain)


def _operands(name: str, args: Arguments) -> tuple[Tensor | None, int, bool]:
    """The state that is summed, the place of what is fixed, and whether that has both signs."""
    if name not in _PRODUCTS:
        return _state(name, args, -1), -1, False
    fixed = [i for i, a in enumerate(args) if isinstance(a, Tensor) and not a.requires_grad]
    if len(fixed) != 1:
        return None, -1, False
    return _state(name, args, fixed[0]), fixed[0], _has_both_signs(args[fixed[0]])


def _state(name: str, args: Arguments, fixed: int) -> Tensor | None:
    """The operand that is summed beside a fixed one; None where it is a weight: x @ w sums over no neighbours."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    places = [i for i in tensors if i != fixed]
    if name in _PRODUCTS:
        place = places[0] if len(places) == 1 and fixed in tensors else -1
    else:
        place = {"sum": 0}.get(name, 3 if name in _SCATTERS else -1)
    if place not in places or _is_weight(args[place]):
        return None
    state: Tensor = args[place]
    return state


def _has_both_signs(operand: Tensor) -> bool:
    held = operand.detach()
    values = held.coalesce().values() if held.layout == torch.sparse_coo else held
    return values.layout == torch.strided and bool((values < 0).any())


def _is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, a part of one, or one entry by entry changed by what is not trained."""
    if isinstance(tensor, nn.Parameter):
        return True
    node: Any = tensor.grad_fn
    while node is not None and not hasattr(node, "variable"):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or not (operation(node) in _OF_WEIGHTS or activation_of(node) is not None):
            return False
        node = parents[0]
    # data times a scale for each feature are more numbers than the scale is, and are a state
    return node is not None and tensor.numel() <= node.variable.numel()


def _with(args: Arguments, fixed: int, operand: Tensor, state: Tensor) -> Arguments:
    """The arguments of a product with other operands."""
    return tuple(operand if i == fixed else state if isinstance(a, Tensor) else a for i, a in enumerate(args))


def _terms(
    name: str, func: Any, args: Arguments, kwargs: dict[str, Any], fixed: int, state: Tensor, result: Tensor
) -> Tensor | None:
    """How many terms every entry of a result, or of what is scattered into it, is made of."""
    if name == "sum":
        count = state.numel() / max(1, result.numel())
        return torch.full((), count, dtype=state.dtype) if result.dim() else None  # a scalar is no state
    if name in _SCATTERS:
        into = torch.zeros_like(args[0])
        counted: Tensor = getattr(torch, name)(into, args[1], args[2], torch.ones_like(args[3]))
        along = args[1] if name == "scatter_add" else None
        return counted.gather(along, args[2]) if along is not None else counted.index_select(args[1], args[2])
    made: Tensor = func(*_with(args, fixed, args[fixed].detach().abs(), torch.ones_like(state)), **kwargs)
    return made


def _rms(tensor: Tensor) -> float:
    held = tensor.detach()
    return float(held.double().square().mean().sqrt()) if held.layout == torch.strided else math.nan


class _Divided(FunctionCalls):
    """Divides what some lines sum by the number of its terms."""

    def __init__(self, found: Sequence[Summing]) -> None:
        super().__init__()
        self._found = found

    def _called(self, func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if name not in _PRODUCTS and name not in _SCATTERS and name != "sum":
            return func(*args, **kwargs)
        each = self._of(name, args)
        if each is None:
            return func(*args, **kwargs)
        if each.signed:
            return func(*args, **kwargs) / each.terms
        if name in _SCATTERS:
            with torch.no_grad():
                terms = _terms(name, func, args, kwargs, each.fixed, args[3], args[0])
            assert terms is not None
            return func(*args[:3], args[3] / terms, *args[4:], **kwargs)
        result, state = func(*args, **kwargs), _state(name, args, each.fixed)
        assert state is not None
        with torch.no_grad():
            terms = _terms(name, func, args, kwargs, each.fixed, state, result)
        return result if terms is None else result / terms.clamp_min(torch.finfo(result.dtype).tiny)

    def _of(self, name: str, args: Arguments) -> Summing | None:
        """Which of these lines a call is; None for another operation of the same line, as the product with a weight."""
        at, free = (_NAMES.get(name, name), calling_line()), []
        if name in _PRODUCTS:
            free = [i for i, a in enumerate(args) if isinstance(a, Tensor) and not a.requires_grad]
        for each in self._found:
            # what a network is given may ask for gradients here, and the fixed operand be known by its place alone
            fits = (each.name, each.line) == at and (len(free) != 1 or free[0] == each.fixed)
            if not fits or _state(name, args, each.fixed) is None:
                continue
            if each.fixed < 0 or _has_both_signs(args[each.fixed]) == each.signed:
                return each
        return None


def divided(found: Sequence[Summing]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What makes a context in which the code runs with the sums of these lines divided by their terms."""

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        with _Divided(found):
            yield

    return within
