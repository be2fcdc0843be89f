"""Where NaN and infinity begin: a training pass watched operation by operation.

What is not finite is followed from the operation that made it through all that it spoils, so the operation that is
blamed is the first one, forward or backward. Infinities that were filled in on purpose, as the -inf of a mask, are no
origin: what makes NaN of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stabkit.diagnosis.non_finite.causes import backward_cause, forward_cause, with_lost_eps
from stabkit.diagnosis.non_finite.domains import COMPOSED, Cause
from stabkit.errors import StabkitError
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.inputs import VALUE_FREE, Source, differentiable
from stabkit.tracing.recording.recorder import clock
from stabkit.tracing.recording.training_pass import Observer, TrainingPass, calling_line, training_pass

# operations that write a constant
_FILLS = frozenset({"masked_fill", "masked_fill_", "fill", "fill_", "full", "full_like", "new_full", "scalar_tensor"})
# operations that a small number is given to, to keep a value from zero
_KEEPERS = frozenset({"clamp_min", "clamp", "add", "maximum", "rsub"})


@dataclass(frozen=True)
class Origin:
    """The first operation whose result is not finite although what it was made of is.

    Attributes:
        order: how many origins came before it.
        part: ``"model"`` or ``"loss"``: in which part of the forward pass the operation stands.
        backward: whether its derivative is at fault, and not its result.
        operation: its name, as ``"sqrt"``.
        path: the module that it runs in; empty in the loss and in code of the outermost module.
        module_class: the class of that module.
        call: index of the last module call that began before it.
        ended: whether that call had ended by then.
        line: file and line of the code outside of libraries that called it; empty where there is none.
        cause: why.
        on_purpose: whether the infinity was filled in.
        fed_by: the last module with a matrix that ran before it; empty where there is none.
        function: the function of torch that was called, where the operation is a part of it, as ``"logdet"``.
        reaches: ``"output"``, ``"loss"`` or ``"gradient"``: the first that it spoils.
        parameter: the parameter or buffer whose zeros are the cause; empty where it is none.
        also: other modules in which the same line begins it anew.
    """

    order: int
    part: str
    backward: bool
    operation: str
    path: str
    module_class: str
    call: int
    ended: bool
    line: str
    cause: Cause
    on_purpose: bool = False
    fed_by: str = ""
    function: str = ""
    reaches: str = ""
    parameter: str = ""
    also: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Operation, module and line, in words."""
        where = (
            "the loss" if self.part == "loss" else f"{self.path} ({self.module_class})" if self.path else "the model"
        )
        if self.cause.given:
            return where + (f", {self.line}" if self.line else "")
        inside = f" (of {self.function})" if self.function else ""
        return f"{self.operation}{inside} in {where}" + (f", {self.line}" if self.line else "")


def origin_of(call: ForwardPass, loss: Any = None) -> Origin | None:
    """The operation at which what is not finite in a training pass began; None where all is finite, or no pass runs."""
    watch = Watch()
    try:
        done = training_pass(call, loss, watch)
    except StabkitError:
        return None  # the loss does not fit; whoever needs it says so
    return watch.blamed(done)


class _Called(FunctionCalls):
    """Notes which function of torch runs, and what it was given: an operation may be a part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.given: tuple[Any, ...] = ()

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer = self.name, self.given
        self.name, self.given = getattr(func, "__name__", ""), args
        try:
            return func(*args, **kwargs)
        finally:
            self.name, self.given = outer


class Watch(Observer):  # type: ignore[no-untyped-call]
    """Follows what is not finite from operation to operation."""

    def __init__(self) -> None:
        self._called = _Called()
        super().__init__(self._called)
        self._all: list[Origin] = []
        self._lost_eps: dict[int, float] = {}  # by storage of what it was to keep from zero: see `_mark`
        self._blame: dict[int, Origin] = {}  # by storage
        self._given: dict[int, str] = {}
        self._lines: dict[int, tuple[str, str, int, bool]] = {}  # by the number of the node: line, part, call, ended

    def begin(self, module: nn.Module, sources: list[Source]) -> None:
        """Note what the pass is given."""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._given.setdefault(_storage(tensor), name)
        for source in sources:
            self._given[_storage(source.tensor)] = f"the input {source.name!r}"

    def blamed(self, done: TrainingPass) -> Origin | None:
        """Who is to blame for the first that is not finite: output, loss, then gradients."""
        outputs = [tensor for _, tensor in named_tensors(done.output) if differentiable(tensor)]
        gradients = [g for g in (*done.inputs, *done.gradients.values()) if g is not None]
        groups = {"output": outputs, "loss": [] if done.loss is None else [done.loss], "gradient": gradients}
        for reached, group in groups.items():
            found = [self._blame[_storage(t)] for t in group if not _finite(t) and _storage(t) in self._blame]
            # what was filled in on purpose is no fault, unless the loss is made of it
            found = [origin for origin in found if reached == "loss" or not origin.on_purpose]
            if found:
                first = min(found, key=lambda origin: (origin.on_purpose, origin.order))
                alike = [o for o in self._all if (o.operation, o.line, o.backward) == _spelling(first) and o.line]
                also = dict.fromkeys(o.path for o in alike if o.path not in ("", first.path))
                return replace(first, reaches=reached, also=tuple(also))
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = args
        if func._schema.is_mutable:  # what it is about to overwrite may be the reason
            given = tree_map(lambda a: a.clone() if isinstance(a, Tensor) and differentiable(a) else a, args)
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if name in VALUE_FREE or name.startswith(("empty", "new_empty")):
            return out
        if self.part != "backward":
            self._lines[clock() - 1] = (calling_line(), self.part, *self._running())
        results = [o for o in tree_leaves(out) if isinstance(o, Tensor) and differentiable(o)]
        if results:
            self._mark(name, args, kwargs, results)
            self._follow(func, name, args, given, kwargs, results)
        return out

    def _follow(
        self, func: Any, name: str, args: Any, given: Any, kwargs: dict[str, Any], results: Sequence[Tensor]
    ) -> None:
        taken = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and differentiable(a)]
        held = {_storage(t) for t in taken}
        finite = [_finite(r) for r in results]
        spoiled = [r for r, fine in zip(results, finite, strict=True) if not fine]
        for result, fine in zip(results, finite, strict=True):
            if fine and _storage(result) not in held:
                self._blame.pop(_storage(result), None)
        if not spoiled:
            return
        before = [t for t in tree_leaves((given, kwargs)) if isinstance(t, Tensor) and differentiable(t)]
        known = [self._origin_of(t) for t, b in zip(taken, before, strict=True) if not _finite(b)]
        real = [origin for origin in known if not origin.on_purpose]
        if real:
            found = min(real, key=lambda origin: origin.order)
        elif known and not any(bool(r.isnan().any()) for r in spoiled):
            found = known[0]
        else:
            filled = name in _FILLS or not taken
            found = self._born(func, name, given, kwargs, results, on_purpose=filled)
        for result in spoiled:
            self._blame[_storage(result)] = found

    def _mark(self, name: str, args: Any, kwargs: dict[str, Any], results: Sequence[Tensor]) -> None:
        """Note numbers that are to keep a value from zero and are zero themselves in its dtype, and what they make."""
        leaves = tree_leaves((args, kwargs))
        taken = [a for a in leaves if isinstance(a, Tensor) and differentiable(a)]
        eps = 0.0
        if name.strip("_") in _KEEPERS:
            numbers = [a for a in leaves if isinstance(a, float) and a > 0.0]
            eps = next((a for a in numbers if results[0].new_tensor(a).item() == 0.0), 0.0)
        if len({_storage(t) for t in taken}) == 1:  # a root of it, or a copy
            eps = eps or self._lost_eps.get(_storage(taken[0]), 0.0)
        for result in results:
            self._lost_eps.pop(_storage(result), None)
            if eps:
                self._lost_eps[_storage(result)] = eps

    def _origin_of(self, tensor: Tensor) -> Origin:
        storage = _storage(tensor)
        if storage not in self._blame:
            held = "loss is made of, such as its targets," if self.part == "loss" else "model holds"
            what = self._given.get(storage, f"a tensor that the {held}")
            masked = not what.startswith("the input") and _only_negative_infinities(tensor)
            made = self.part != "loss" and storage in self._given and not what.startswith("the input")
            look = "look at where these numbers come from"
            how = f"start {what} from numbers (torch.empty holds whatever was there), or go back to a checkpoint"
            cause = Cause(f"{what} is NaN or infinite already", how if made else look, given=True)
            self._blame[storage] = self._origin("given", cause, on_purpose=masked)
        return self._blame[storage]

    def _born(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], results: Sequence[Tensor], on_purpose: bool
    ) -> Origin:
        lost = [self._lost_eps.get(_storage(t), 0.0) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        eps = max(lost, default=0.0)
        if self.part == "backward" and self.node is not None:
            cause = backward_cause(self.node, func, name, args, kwargs, results)
            cause = with_lost_eps(cause, eps, results[0].dtype)
            return self._origin(operation(self.node).lower(), cause, on_purpose=False)
        called = self._called.name
        if called in COMPOSED and self._called.given:
            found = COMPOSED[called](self._called.given[0])
            if found is not None:
                return self._origin(called, found, on_purpose=False)
        cause = with_lost_eps(forward_cause(func, name, args, kwargs, results), eps, results[0].dtype)
        origin = self._origin(name.strip("_"), cause, on_purpose=on_purpose)
        parameter = "" if cause.zero is None else self._given.get(_storage(cause.zero), "")
        return replace(origin, function=_whole(called, origin.operation), parameter=parameter)

    def _origin(self, name: str, cause: Cause, on_purpose: bool) -> Origin:
        backward = self.part == "backward"
        line, part, call, ended = calling_line(), self.part, *self._running()
        if backward:
            number = -1 if self.node is None else self.node._sequence_nr()
            line, part, call, ended = self._lines.get(number, ("", "model", len(self.recording.calls) - 1, True))
        inside = self._innermost(call, ended) if part == "model" else None
        found = Origin(
            order=len(self._all),
            part=part,
            backward=backward,
            operation=name,
            path="" if inside is None else inside[0],
            module_class="" if inside is None else inside[1],
            call=call,
            ended=ended,
            line=line,
            cause=cause,
            on_purpose=on_purpose,
            fed_by=self._fed_by(call) if part == "model" else "",
        )
        self._all.append(found)
        return found

    def _fed_by(self, index: int) -> str:
        """The last module up to some call that multiplies by a matrix of its own."""
        for call in reversed(self.recording.calls[: index + 1]):
            if any(p.dim() > 1 for p in call.module.parameters(recurse=False)):
                return call.path
        return ""

    def _running(self) -> tuple[int, bool]:
        """The last module call that began, and whether another runs now: the one that it was made from."""
        calls = self.recording.calls
        return len(calls) - 1, bool(calls) and calls[-1].stop >= 0

    def _innermost(self, index: int, ended: bool) -> tuple[str, str] | None:
        """Path and class of the innermost module that ran when a call had begun last, and perhaps ended."""
        calls = self.recording.calls
        if index < 0:
            return None
        call = calls[index]
        if self.part != "backward" and ended:  # the innermost that still runs
            running = [c for c in calls if c.stop < 0]
            return (running[-1].path, running[-1].module_class) if running else None
        if ended:
            if call.parent < 0:
                return None
            call = calls[call.parent]
        return call.path, call.module_class


def _spelling(origin: Origin) -> tuple[str, str, bool]:
    return origin.operation, origin.line, origin.backward


def _whole(function: str, part: str) -> str:
    """A function of torch that an operation is a part of; empty where they are one, or the function has no name."""
    plain = function.strip("_")
    same = function.startswith("__") or plain in part or part in plain
    return "" if same or plain in ("apply", "backward", "grad") else plain


def _storage(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return id(tensor)
    address: int = tensor.untyped_storage()._cdata
    return address


def _finite(tensor: Tensor) -> bool:
    data = tensor.values() if tensor.layout == torch.sparse_coo else tensor
    return bool(data.detach().isfinite().all())


def _only_negative_infinities(tensor: Tensor) -> bool:
    """Whether all that is not finite is -inf, as in a mask."""
    return not tensor.is_complex() and bool(torch.isneginf(tensor[~tensor.isfinite()]).all())
