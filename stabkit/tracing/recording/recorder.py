"""One real forward pass, recorded on one clock; the autograd graph it leaves is the tape.

The clock is autograd's own sequence number: every node gets one when it is made, and the beginnings and ends of
module calls are read off the same counter, so modules and operations share a time axis and no tensor has to be
matched by identity.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from stabkit.tracing.graph.values import Value, value_of
from stabkit.tracing.recording.attentions import ATTENTIONS, masks_given
from stabkit.tracing.recording.draws import LINEAR, NORMAL, ROUNDS, UNIFORM, Draws
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.inputs import INDEXING, VALUE_FREE, Source, differentiable, non_leaf
from stabkit.tracing.recording.off_graph import OffGraph
from stabkit.tracing.recording.transparency import EagerMode
from stabkit.tracing.recording.untouched_model import Safe
from stabkit.tracing.recording.written import ACCUMULATES, HANDED_OUT, facts, written

# makes of an output the output to keep, and the tensors to end at by their names
Ending = Callable[[Any], tuple[Any, list[tuple[str, Tensor]]]]


_DETACH = torch.ops.aten.detach.default
_LISTS = (list, tuple)


def clock() -> int:
    """The sequence number that the next autograd node of this thread will get."""
    now: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return now


@dataclass
class Call:
    """One call of a module: an interval on the clock, and the call it was made from."""

    index: int
    path: str
    module: nn.Module
    parent: int
    start: int
    stop: int = -1
    finished: bool = False

    @property
    def module_class(self) -> str:
        """The class of the module, as its author named it."""
        return str(getattr(self.module, "original_name", type(self.module).__name__))


@dataclass
class Stopped:
    """A place where a tensor that depends on the input stopped carrying gradient."""

    operation: str
    time: int
    path: str


@dataclass
class Recording:
    """What one forward pass left behind.

    Attributes:
        sources: where depth can be counted from, in the order of their creation.
        calls: module calls in the order of their beginnings.
        values: the data of every recorded value, detached, at its own version.
        hooks: tensor hooks that the model registered, by the value whose gradient they see.
        output: what the model returned, still on the graph.
        ends: the tensors that were made of the output to end at, by their names; None where an output itself is meant.
        stopped: where dependence on the input went on without gradient.
        routed: when operations took integers or masks that were made from values on the graph: indices of the largest,
            experts that were chosen.
        noisy: when values on the graph were scaled by, or added to, normal numbers that this pass drew.
        dropped: when values on the graph met uniform numbers that this pass drew, or masks of them.
        fed: when values on the graph met what was made of an input off the graph, and from which operations, by their
            numbers, that had been made; see `OffGraph.follow`.
        read: when numbers that depend on an input were handed to Python.
        masked: whether an attention of torch was given a mask.
        written: ids of the parameters that the model wrote to.
        way_back: what keeps the model as it is while code of its own runs on the way back.
        undifferentiated: what the model took derivatives by, though nothing on the graph was made of it.
    """

    sources: list[Source] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    values: dict[Value, Tensor] = field(default_factory=dict)
    hooks: dict[Value, list[Callable[[Tensor], Tensor | None]]] = field(default_factory=dict)
    output: Any = None
    ends: list[tuple[str, Tensor]] | None = None
    stopped: list[Stopped] = field(default_factory=list)
    routed: set[int] = field(default_factory=set)
    noisy: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    fed: dict[int, frozenset[int]] = field(default_factory=dict)
    read: list[int] = field(default_factory=list)
    masked: bool = False
    written: frozenset[int] = frozenset()
    way_back: contextlib.AbstractContextManager[None] = field(default_factory=contextlib.nullcontext)
    undifferentiated: list[Tensor] = field(default_factory=list)
    start: int = 0
    stop: int = 0

    def place(self, value: Value) -> tuple[int, int]:
        """What tells a value of this recording from others, the same whenever the pass is run again."""
        return value.node._sequence_nr() - self.start, value.output

    def begun(self, first: int, last: int) -> list[Call]:
        """The finished module calls that began from ``first`` on and before ``last``, by the clock."""
        low, high = (bisect.bisect_left(self.calls, time, key=lambda call: call.start) for time in (first, last))
        return [call for call in self.calls[low:high] if call.finished]

    @property
    def running(self) -> str:
        """Path of the innermost module that runs now; empty for the model itself."""
        return self._innermost(len(self.calls) - 1, lambda call: call.stop < 0)

    def path_at(self, time: int) -> str:
        """Path of the innermost module that was running when the clock showed ``time``."""
        last = bisect.bisect_right(self.calls, time, key=lambda call: call.start) - 1
        return self._innermost(last, lambda call: time < call.stop or call.stop < 0)

    def _innermost(self, last: int, runs: Callable[[Call], bool]) -> str:
        """Path of the first call that ran, of the one that began last and those it was made from: calls are nested."""
        while last >= 0 and not runs(self.calls[last]):
            last = self.calls[last].parent
        return self.calls[last].path if last >= 0 else ""


class ValueRecorder(EagerMode):
    """Notes the value of every tensor on the graph when it is consumed, before anything can overwrite it.

    Below autograd the arguments still show the node that made them, and keep their identity. ``wanted`` says which
    values are kept, by their places; None for all.
    """

    def __init__(
        self,
        recording: Recording,
        safe: Safe,
        tainted: list[Tensor],
        promote_casts: bool,
        wanted: frozenset[tuple[int, int]] | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted = wanted
        self.recording = recording
        self.safe = safe
        self.promote_casts = promote_casts
        self.tainted = {id(t): t for t in tainted}  # integers made from the input; kept so that ids stay theirs
        self.promoted: dict[int, tuple[Tensor, str]] = {}
        # depend on the input, carry no gradient; held weakly, or everything inside a custom Function would stay alive
        self.silent: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.chosen: dict[int, weakref.ref[Tensor]] = {}  # integers and masks made from values on the graph
        self._draws = (
            (Draws(NORMAL, LINEAR, zeros=False), recording.noisy),
            (Draws(UNIFORM, LINEAR | ROUNDS, zeros=True), recording.dropped),
        )
        self.off_graph = OffGraph(tainted)
        self._on_storage: defaultdict[int, list[Value]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(*args, *kwargs.values())
        on_graph = [tensor for tensor in tensors if tensor.requires_grad]
        for tensor in on_graph:
            self._see(tensor)
        name, writes = facts(func)
        if writes:
            for tensor in written(func._schema, args, kwargs):
                self._before_write(tensor)
        out = func(*args, **kwargs)
        results = tensors_in(out)
        for draws, met in self._draws:
            if draws.meet(name, tensors, results):
                met.add(clock() - 1)  # the node has its number already
        leaves = not torch.is_grad_enabled() or func is _DETACH
        fed, read = self.off_graph.follow(name, tensors, on_graph, results, leaves)
        if fed:
            self.recording.fed[clock() - 1] = fed
        if read:
            self.recording.read.append(clock())
        if name not in VALUE_FREE:
            if self.tainted:
                self._follow_integers(name, tensors, results)
            self._follow_gradients(func, tensors, bool(on_graph), results, leaves)
            self._follow_choices(tensors, bool(on_graph), results)
        return out

    def _see(self, tensor: Tensor) -> None:
        if tensor.grad_fn is None:
            return  # a promoted leaf: its only consumer is the clone that is the source
        value = Value(tensor.grad_fn, tensor.output_nr)
        if self.wanted is not None and self.recording.place(value) not in self.wanted:
            return
        if value not in self.recording.values:
            self.recording.values[value] = data = tensor.detach()
            if data.layout == torch.strided:
                self._on_storage[data.untyped_storage()._cdata].append(value)

    def _before_write(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        self.safe.before_write(tensor)
        for value in self._on_storage.pop(tensor.untyped_storage()._cdata, ()):
            self.recording.values[value] = self.recording.values[value].clone()

    def _follow_integers(self, name: str, tensors: list[Tensor], results: list[Tensor]) -> None:
        if not any(id(t) in self.tainted for t in tensors):
            return
        for result in results:
            if not differentiable(result):
                self.tainted[id(result)] = result
            elif any(result is t for t in tensors):
                continue
            elif self._is_source(name, tensors) and not result.is_inference():
                result.requires_grad_(True)
                self.promoted[id(result)] = (result, name)

    def _follow_choices(self, tensors: list[Tensor], on_graph: bool, results: list[Tensor]) -> None:
        chosen = bool(self.chosen) and any(self._is_chosen(t) for t in tensors)
        if chosen and on_graph:
            self.recording.routed.add(clock() - 1)  # the node has its number already
        if chosen or on_graph:
            for result in results:
                if not differentiable(result) or not on_graph:  # a mask of choices as numbers
                    self.chosen[id(result)] = weakref.ref(result)

    def _is_chosen(self, tensor: Tensor) -> bool:
        entry = self.chosen.get(id(tensor))
        return entry is not None and entry() is tensor

    def _is_source(self, name: str, tensors: list[Tensor]) -> bool:
        return not any(t.requires_grad for t in tensors) and (name in INDEXING or self.promote_casts)

    def note_exit(self, tensor: Tensor, *, to_numpy: bool) -> None:
        """Note that the data of a tensor leaves torch, if it depends on the input."""
        if tensor.requires_grad or self.off_graph.holds(tensor):
            self.recording.read.append(clock())
        if to_numpy and self._is_silent(tensor) and torch.is_grad_enabled():  # inside a custom Function nothing is lost
            now = clock()
            self.recording.stopped.append(Stopped("numpy()", now, self.recording.path_at(now)))

    def _follow_gradients(
        self, func: Any, tensors: list[Tensor], on_graph: bool, results: list[Tensor], leaves: bool
    ) -> None:
        """Mark floats that depend on the input but left the graph, and note where the graph takes them up again.

        Inside a custom ``autograd.Function`` everything is off the graph and that is as it should be; so a loss
        of gradient is noted only when such a value is used where gradients are on.
        """
        lost = [t for t in tensors if not t.requires_grad and self._is_silent(t)] if self.silent else []
        if lost and on_graph and torch.is_grad_enabled():
            now = clock() - 1  # the node that takes it up has its number already
            operation = self.silent[id(lost[0])][1]
            self.recording.stopped.append(Stopped(operation, now, self.recording.path_at(now)))
        if not lost and not (leaves and on_graph):
            return
        operation = self.silent[id(lost[0])][1] if lost else str(func)
        for result in results:
            if differentiable(result) and not result.requires_grad:  # written to in place as well
                self.silent[id(result)] = (weakref.ref(result), operation)

    def _is_silent(self, tensor: Tensor) -> bool:
        entry = self.silent.get(id(tensor))
        return entry is not None and entry[0]() is tensor


# where values leave torch; what comes back from there has no gradient
_EXITS: tuple[Any, ...] = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist)


class _NonLeafSources(TorchFunctionMode):
    """Replaces a promoted leaf by a copy on the graph, since models write to their embeddings in place."""

    def __init__(self, recording: Recording, values: ValueRecorder) -> None:
        super().__init__()
        self.recording = recording
        self.values = values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in HANDED_OUT:
            self.values.safe.before_write(args[0])
        elif func in ACCUMULATES:
            self.values.safe.before_gradients()
        if func in _EXITS:
            self.values.note_exit(args[0], to_numpy=func is not torch.Tensor.tolist)
        if func in ATTENTIONS:
            self.recording.masked |= bool(masks_given(func, args, kwargs or {}))
        if func is torch.Tensor.register_hook and args[0].requires_grad and args[0].grad_fn is not None:
            self.recording.hooks.setdefault(value_of(args[0]), []).append(args[1])
        if func is torch.autograd.grad:
            by = tensors_in(args[1] if len(args) > 1 else (kwargs or {}).get("inputs"))
            self.recording.undifferentiated += [tensor for tensor in by if not tensor.requires_grad]
        result = func(*args, **(kwargs or {}))
        entry = self.values.promoted.pop(id(result), None) if isinstance(result, Tensor) else None
        if entry is None or result.grad_fn is not None:
            return result
        copy = non_leaf(result)
        name = self.recording.path_at(clock()) or "input"
        name = f"module {name}" if name.isdigit() else name  # "0" is the first input
        earlier = sum(s.name.split("#")[0] == name for s in self.recording.sources)
        name = f"{name}#{earlier + 1}" if earlier else name  # a table shared by encoder and decoder is two sources
        self.recording.sources.append(Source(name, entry[1], copy, value_of(copy)))
        return copy


def tensors_in(*held: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an operation: they come alone, or in lists, tuples and dicts."""
    found: list[Tensor] = []
    for item in held:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, _LISTS):  # a union of both would be made anew for every argument
            found += tensors_in(*item)
        elif isinstance(item, dict):
            found += tensors_in(*item.values())
    return found


@contextlib.contextmanager
def recording_calls(model: nn.Module, recording: Recording) -> Iterator[None]:
    """Note when each module of this thread is entered and left; the modules themselves are not touched."""
    paths = {id(module): path for path, module in model.named_modules()}
    thread = threading.get_ident()
    stack: list[Call] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if threading.get_ident() != thread:
            return
        path = paths.get(id(module))
        if path is None:
            return  # a wrapper made by a library on the way, not part of the model
        parent = stack[-1].index if stack else -1
        call = Call(len(recording.calls), path, module, parent, clock())
        recording.calls.append(call)
        stack.append(call)

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        if threading.get_ident() != thread or id(module) not in paths:
            return
        while stack:
            call = stack.pop()
            call.stop = clock()
            if call.module is module:
                call.finished = True
                return

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave),
    ]
    with hooked(handles):
        yield


def record(
    model: Any,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recording: Recording,
    values: ValueRecorder,
    ending: Ending | None = None,
) -> Any:
    """Run the model once under the recording modes; the caller prepares inputs, freezing and kernels.

    ``ending`` makes of the output what the flow ends at, recorded like the rest.
    """
    with recording_calls(module, recording), _NonLeafSources(recording, values), values:
        recording.output = model(*args, **kwargs)
        if ending is not None:
            recording.output, recording.ends = ending(recording.output)
    recording.stop = clock()
    return recording.output
