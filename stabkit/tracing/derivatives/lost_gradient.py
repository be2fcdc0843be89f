"""Where gradients stop: the parameters that a loss does not reach, and the operation behind which they are cut off.

A tensor leaves the graph by an operation that has no derivative (``detach``, ``argmax``, a comparison), under
``no_grad``, or by leaving torch (``numpy``, ``tolist``, ``item``). Many do so for good reasons: only those are named
behind which parameters are lost, and of them the ones whose results are used again.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from stabkit.errors import StabkitError
from stabkit.tracing.derivatives.flat_derivatives import FlatDerivative, differentiated_twice, flat_derivatives
from stabkit.tracing.graph.values import Value, value_of
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.inputs import differentiable
from stabkit.tracing.recording.made_parameters import on_graph, parameters_made
from stabkit.tracing.recording.recorder import clock, tensors_in
from stabkit.tracing.recording.training_pass import (
    LIBRARIES,
    REENTRANT,
    Observer,
    TrainingPass,
    calling_line,
    calling_place,
    nodes_above,
    nodes_from,
    training_pass,
)
from stabkit.vocabulary import is_python_node

_EXITS = {
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "numpy()",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.item: "item()",
}


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
DRAW = ".sample()"  # how the draw of a distribution ends that has rsample()
INDICES = "the indices of "  # how an operation begins of whose results only those left the graph
FIRST_ORDER = "autograd.grad without create_graph"
MADE = "nn.Parameter(...)"  # a new leaf, made of what is on the graph


@dataclass
class Cut:
    """A place where tensors left the graph.

    Attributes:
        operation: what took them off it: ``"detach"``, ``"argmax"``, ``"no_grad"``, ``"tolist()"``, `REENTRANT`.
        path: the module that runs it.
        line: file and line that called it, outside of libraries; empty where there is none.
        behind: the module that made what was taken off: the last one still attached.
        parameters: those that get no gradient for it, by path.
    """

    operation: str
    path: str
    line: str
    behind: str
    parameters: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """In words."""
        where = f" in {self.path}" if self.path else ""
        line = f" ({self.line})" if self.line else ""
        return f"{self.operation}{where}{line}" + (f", behind {self.behind}" if self.behind else "")


@dataclass(frozen=True)
class LostGradient:
    """What of a model a loss does not reach.

    Attributes:
        trainable: parameters that require grad, by path, with their sizes.
        lost: those of them that get no gradient.
        cuts: where they are cut off.
        unused: those of the lost that no cut accounts for: their modules never run, or nothing uses what they make.
        idle: modules with parameters that never ran.
        flat: derivatives that the model takes of itself and that are zero everywhere.
    """

    trainable: dict[str, int]
    lost: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()
    unused: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    flat: tuple[FlatDerivative, ...] = ()


def lost_gradient(call: ForwardPass, loss: Any = None, done: TrainingPass | None = None) -> LostGradient:
    """The parameters that get no gradient, with the places where they are cut off.

    Args:
        call: the model and what it is called with.
        loss: a callable on the output that returns a scalar; None counts every float output.
        done: a training pass of this call and loss that was made before; None makes one.

    Raises:
        TraceError: the model or the loss fails.
    """
    done = training_pass(call, loss, differentiate=False) if done is None else done
    nodes = [] if done.loss is None else nodes_above(done.loss)
    lost = _lost(done, nodes)
    if lost and any(map(is_python_node, nodes)):  # whose backward may give parameters gradients by itself
        given = done.gradients or training_pass(call, loss).gradients
        lost = tuple(path for path in lost if given.get(path) is None)
    flat = flat_derivatives(call, loss) if differentiated_twice(nodes) else ()
    trainable = {path: p.numel() for path, p in done.parameters.items()}
    if not lost:
        return LostGradient(trainable, (), flat=flat)
    watch = Exits()
    done = training_pass(call, loss, watch, differentiate=False)
    cuts = watch.cuts(done, lost)
    found = {path for cut in cuts for path in cut.parameters}
    ran = {c.path for c in done.calls}
    rest = tuple(path for path in lost if path not in found)
    idle = tuple(dict.fromkeys(home for p in rest if (home := p.rpartition(".")[0]) not in ran))
    return LostGradient(trainable, lost, tuple(cuts), rest, idle, flat)


def place_of_cut(call: ForwardPass) -> str:
    """Where a model whose output carries no gradient cuts it off, in words; empty where that is not seen."""
    try:
        found = lost_gradient(call)
    except StabkitError:
        return ""
    if not found.cuts:
        return ""
    cut = found.cuts[-1]
    return f"the gradient stops at {cut.place}" + (
        f"; no gradient gets to {listed(cut.parameters)}" if cut.parameters else ""
    )


def copied_inputs(call: ForwardPass) -> tuple[str, ...]:
    """Inputs that the output depends on through copies which the model itself takes off the graph, by name.

    So networks of equations do: ``x.detach().requires_grad_()``, by which they differentiate.
    """
    try:
        output = training_pass(call, differentiate=False).output
    except StabkitError:
        return ()
    nodes = [node for _, t in named_tensors(output) if t.requires_grad for node in nodes_above(t)]
    leaves = [node.variable.detach() for node in nodes if hasattr(node, "variable")]
    return tuple(path for path, t in call.given if any(_equal(t.detach(), leaf) for leaf in leaves))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.layout == other.layout and bool((one == other).all())


def listed(names: tuple[str, ...], count: int = 4) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def lost_without_checkpoints(call: ForwardPass, loss: Any = None) -> tuple[str, ...]:
    """The parameters that get no gradient where checkpoints are not reentrant.

    Raises:
        TraceError: the model or the loss fails.
    """
    done = training_pass(call, loss, differentiate=False, reentrant=False)
    return _lost(done, [] if done.loss is None else nodes_above(done.loss))


def _lost(done: TrainingPass, nodes: list[Node]) -> tuple[str, ...]:
    reached = _variables(nodes)
    return tuple(path for path, p in done.parameters.items() if id(p) not in reached)


def _variables(nodes: list[Node]) -> set[int]:
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


@dataclass
class Use:
    """What was taken off the graph meets what is on it.

    Attributes:
        number: that of the node which is made.
        part: which part of the pass.
        attached: what is on the graph.
    """

    number: int
    part: str
    attached: list[Tensor]


@dataclass
class Event:
    """Something leaves the graph."""

    cut: Cut
    values: list[Value]  # what was taken off the graph
    parameters: list[Tensor] = field(default_factory=list)  # used without a graph
    used: bool = False
    left: bool = False  # whether it left torch, where nothing can be followed
    part: str = "model"  # of the pass in which it happened
    uses: list[Use] = field(default_factory=list)

    def leaves(self) -> set[int]:
        """The leaves, by id, that what left is made of."""
        above = [node for value in self.values for node in nodes_from(value.node)]
        return _variables(above) | set(map(id, self.parameters))


class Exits(Observer):  # type: ignore[no-untyped-call]
    """Notes where tensors leave the graph, and whether what becomes of them is used again."""

    def __init__(self) -> None:
        super().__init__(_Functions(self))
        self.events: list[Event] = []
        self._silent: dict[int, tuple[weakref.ref[Tensor], Event]] = {}
        self._stretch: Event | None = None  # that of the operations without grad that run one after another
        self._making: Any = contextlib.nullcontext()

    def __enter__(self) -> Any:
        self._making = parameters_made(self.made)
        self._making.__enter__()
        try:
            return super().__enter__()
        except BaseException:
            self._making.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._making.__exit__(None, None, None)

    def made(self, data: Tensor | None, parameter: Tensor) -> None:
        """A parameter is made, which is a leaf, of what may have a history."""
        if data is not None and on_graph(data):
            self.note(MADE, [data]).used = True
        elif data is not None:
            self.written(parameter, data)

    def written(self, tensor: Tensor, value: Tensor) -> None:
        """A tensor takes the numbers of another without any operation: where these left the graph is known still."""
        event = self.event_of(value)
        if event is not None:
            self._silent[id(tensor)] = (weakref.ref(tensor), event)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        taken, results = tensors_in(args, kwargs), tensors_in(out)
        with_grad = torch.is_grad_enabled()
        if with_grad:
            self._stretch = None
        attached = [t for t in taken if t.requires_grad]
        known = [found for t in taken if (found := self.event_of(t)) is not None]
        name = func._schema.name.split("::")[-1].strip("_")
        dropped = name == "detach" or not with_grad or not any(differentiable(r) for r in results)
        event = known[0] if known else None
        if attached and dropped and results:
            event = self.note(name if with_grad else self.within[0] or "no_grad", attached)
        elif attached and (indices := [r for r in results if not differentiable(r)]):
            chosen = self.note(f"{INDICES}{name}", attached)  # of max, sort and the like, whose values stay on it
            self._silent.update({id(each): (weakref.ref(each), chosen) for each in indices})
        elif known and attached and with_grad:
            use = Use(clock() - 1, self.part, attached)
            for each in known:
                each.used = True
                each.uses.append(use)
        if event is not None and (dropped or not attached):
            for result in results:
                if not any(result is t for t in attached):
                    self._silent[id(result)] = (weakref.ref(result), event)
        return out

    def note(self, operation: str, attached: list[Tensor], left: bool = False) -> Event:
        """A tensor on the graph gives something that is not."""
        values = [value_of(t) for t in attached if t.grad_fn is not None]
        parameters: list[Tensor] = [t for t in attached if t.grad_fn is None]
        path = self.recording.running
        stretch = self._stretch
        switched_off = not torch.is_grad_enabled() and not left
        if switched_off and stretch is not None and stretch.cut.operation == operation:
            stretch.values += values
            stretch.parameters += parameters
            stretch.cut.path = _common(stretch.cut.path, path)
            return stretch
        behind = self._path_of(values[0]) if values else self._before()
        if operation == REENTRANT:
            behind = ""  # what is lost is inside
        line = calling_place if self.part == "loss" else calling_line  # a loss belongs to no module
        event = Event(
            Cut(operation, path, self.within[1] or line(), behind),
            values,
            parameters,
            left=left,
            part=self.part,
        )
        self.events.append(event)
        if switched_off:
            self._stretch = event
        return event

    def switched(self, on: bool) -> None:
        """Gradients are switched on or off."""
        if on and DRAW in self.within[0]:
            self.within = ("", "")
        elif not on and torch.is_grad_enabled() and (drawn := _drawn_by()):
            self.within = (drawn, calling_line())

    def differentiated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A gradient is taken without a graph of its own."""
        before, self.within = self.within, (FIRST_ORDER, calling_line())
        try:
            return func(*args, **kwargs)
        finally:
            self.within = before

    def end_in_loss(self, scalar: Tensor | None) -> Cut | None:
        """Where what a loss is made of left the graph within the loss, for the last time; None where it did not.

        Args:
            scalar: what the loss returned; it may require grad all the same.
        """
        made = None if scalar is None else self.event_of(scalar)
        if made is not None and made.part == "loss":
            return made.cut
        inside = [event for event in self.events if event.part == "loss" and (event.used or event.left)]
        return inside[-1].cut if inside else None

    def _path_of(self, value: Value) -> str:
        return self.recording.path_at(value.node._sequence_nr())

    def _before(self) -> str:
        """The last module that ended before."""
        return next((call.path for call in reversed(self.recording.calls) if call.finished), "")

    def event_of(self, tensor: Tensor) -> Event | None:
        """Where what a tensor without gradient is made of left the graph; None where that was not seen."""
        entry = self._silent.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def cuts(self, done: TrainingPass, lost: tuple[str, ...]) -> list[Cut]:
        """The places behind which parameters are lost, those whose results are used again if there are any."""
        for _, tensor in named_tensors(done.output):
            event = self.event_of(tensor)
            if event is not None:
                event.used = True
        names = {id(done.parameters[path]): path for path in lost}
        reached = set() if done.loss is None else set(nodes_above(done.loss))
        found: list[tuple[Event, set[str]]] = []
        for event in self.events:
            behind = set(map(id, event.parameters))
            for value in event.values:
                if value.node not in reached:
                    behind |= _variables(nodes_from(value.node))
            lost_here = {names[each] for each in behind if each in names}
            if lost_here or (done.loss is None and event.values):
                found.append((event, lost_here))
        for chosen in ([p for p in found if p[0].used], [p for p in found if p[0].left]):
            if chosen:
                return _distinct(chosen, lost)
        return []


def _distinct(found: list[tuple[Event, set[str]]], lost: tuple[str, ...]) -> list[Cut]:
    """For each set of lost parameters the last place: what is nearest to where the gradient comes from."""
    cuts: list[Cut] = []
    taken: set[str] = set()
    for event, names in reversed(found):
        if names <= taken and (cuts or not names):
            continue
        here = tuple(path for path in lost if path in names - taken)
        taken |= names
        cuts.append(replace(event.cut, parameters=here))
    if not cuts and found:
        cuts = [found[-1][0].cut]
    return cuts[::-1]


def _common(one: str, other: str) -> str:
    """The path of the module that holds two."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _drawn_by() -> str:
    """The draw of a distribution that switches gradients off now, or nothing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, owner = frame.f_code, frame.f_locals.get("self")
        if isinstance(owner, Distribution):
            if code.co_name == "sample":
                return f"{type(owner).__name__}{DRAW}{'' if owner.has_rsample else ', which has no rsample()'}"
        elif not code.co_filename.startswith(LIBRARIES):
            return ""
        frame = frame.f_back
    return ""


class _Functions(TorchFunctionMode):
    """Sees tensors leave torch."""

    def __init__(self, exits: Exits) -> None:
        super().__init__()
        self.exits = exits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self.exits.switched(bool(args[0]))
        elif func is torch.autograd.grad and self.exits.part != "backward":
            if not kwargs.get("create_graph", len(args) > 4 and args[4]):
                return self.exits.differentiated(func, args, kwargs)
        elif func == _SET_DATA:
            self.exits.written(args[0], args[1])
        elif func in _EXITS and args:
            tensor = args[0]
            if tensor.requires_grad:
                self.exits.note(_EXITS[func], [tensor], left=True)
            else:
                event = self.exits.event_of(tensor)
                if event is not None:
                    event.left = True
        return func(*args, **kwargs)
