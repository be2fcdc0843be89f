"""One pass as training makes it: forward, loss and backward, with the parameters that train on the graph.

`stabkit.trace` freezes the parameters, since a flow is about states. What a loss does, which parameters it reaches and
which operation spoils a number is seen on a pass in which they are not frozen. The model comes back as it was.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from stabkit import errors
from stabkit.errors import TraceError
from stabkit.tracing.cutting.endpoints import UnreachedError, scalar_loss
from stabkit.tracing.graph.values import normal_from, value_of
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.inputs import Source, differentiable, prepare
from stabkit.tracing.recording.recorder import Call, Recording, recording_calls
from stabkit.tracing.recording.sharding import take_whole
from stabkit.tracing.recording.transparency import EagerMode, transparent
from stabkit.vocabulary import is_python_node

#: Folders whose code is not the user's.
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(errors.__file__).parent))
#: functions of this package that run a model: code further out is the user's
_PASSES = ("training_pass", "evaluated", "summing_operations")


class Observer(EagerMode):
    """Sees every operation of a training pass; the parts of the pass are announced to it.

    Attributes:
        part: ``"model"``, ``"loss"`` or ``"backward"``.
        node: the autograd node that runs, while ``part`` is ``"backward"``.
        recording: the calls of modules so far.
        within: what switches gradients off for the operations that run now, and the line that called it, where that
            is no ``torch.no_grad``; empty otherwise.

    Args:
        functions: a mode that sees the functions of torch, and is entered and left with this one.
    """

    def __init__(self, functions: TorchFunctionMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "model"
        self.node: Node | None = None
        self.recording = Recording()
        self.within = ("", "")
        self._functions: Any = contextlib.nullcontext() if functions is None else functions

    def __enter__(self) -> Any:
        self._functions.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))

    def begin(self, module: nn.Module, sources: list[Source]) -> None:
        """The pass is about to begin, on this module and these inputs."""


@dataclass
class TrainingPass:
    """What one training pass left behind.

    Attributes:
        calls: module calls in the order of their beginnings.
        output: what the model returned, on the graph.
        loss: the scalar that was differentiated; None where it depends on nothing that carries gradient.
        parameters: those that require grad, by path; a tied one by its first.
        gradients: the gradients of the parameters that the loss reaches; None for the others.
        inputs: gradients of the float inputs, in their order.
        without_graph: whether the model or the loss switched gradients off, or took some without ``create_graph``.
        detached: how often the model or the loss took a tensor off its graph.
    """

    calls: list[Call]
    output: Any
    loss: Tensor | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    inputs: list[Tensor | None] = field(default_factory=list)
    without_graph: bool = False
    detached: int = 0


def training_pass(
    call: ForwardPass,
    loss: Any = None,
    observer: Observer | None = None,
    *,
    differentiate: bool = True,
    reentrant: bool = True,
) -> TrainingPass:
    """One forward pass, the loss of it and its gradients.

    Args:
        call: the model and what it is called with.
        loss: a callable on the output that returns a scalar; None takes a random combination of all float outputs.
        observer: sees every operation; None runs without one.
        differentiate: False stops at the loss.
        reentrant: whether reentrant checkpoints pass gradients on as they do, only where some of what goes in asks
            for them; False lets all through, as those that are not reentrant do.

    Raises:
        TraceError: the loss is not a differentiable scalar of the output, or its backward pass raises.
    """
    watching = Observer() if observer is None else observer
    mode = contextlib.nullcontext() if observer is None else observer
    checkpoint = _Reentrant(watching) if reentrant and not call.through_no_grad else None
    with torch.inference_mode(False), call.kept(loss), transparent(call.through_no_grad, checkpoint):
        take_whole(call.module)
        prepared = prepare(call.inputs, call.kwargs)
        if checkpoint is not None:
            checkpoint.promoted = _promoted(call, prepared.sources)
        watching.begin(call.module, prepared.sources)
        with torch.enable_grad(), recording_calls(call.module, watching.recording), mode:
            output = call.model(*prepared.args, **prepared.kwargs)
        done = TrainingPass(watching.recording.calls, output)
        # a parameter on the meta device is kept elsewhere; what runs is a copy that a hook fetches
        named = call.module.named_parameters()
        done.parameters = {path: p for path, p in named if p.requires_grad and not p.is_meta}
        watching.part = "loss"
        with mode:
            done.loss = combination(output, call.seed) if loss is None else _loss(loss, output)
        if checkpoint is not None:
            done.without_graph, done.detached = checkpoint.without_graph, checkpoint.detached
        if done.loss is not None and differentiate:
            watching.part = "backward"
            handles = _announced(done.loss, watching) if observer is not None else []
            with mode, hooked(handles):
                _differentiate(done, prepared.sources)
    return done


REENTRANT = "checkpoint(use_reentrant=True)"


class _Reentrant:
    """Stands in for the reentrant ``CheckpointFunction``.

    It runs its function without gradients and asks for them later, through its own arguments: where none of these
    requires grad, nothing comes back to the parameters inside. Inputs that require grad in this pass alone, since a
    flow begins at them, do not count.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.promoted: frozenset[Node] = frozenset()
        self.without_graph = False
        self.detached = 0
        self._asking: set[Node] = set()

    def ask(self, tensor: Tensor) -> None:
        """The model makes a tensor require grad, which may do so in this pass already."""
        if tensor.grad_fn is not None:
            self._asking.add(tensor.grad_fn)

    def apply(self, function: Any, _preserve_rng_state: bool, *args: Any) -> Any:
        if any(isinstance(given, Tensor) and self._asked_for(given) for given in args):
            return function(*args)
        before, self.observer.within = self.observer.within, (REENTRANT, calling_line())
        try:
            with torch.no_grad():
                result = function(*args)
                return map_tensors(result, lambda t: t.detach() if t.requires_grad else t)
        finally:
            self.observer.within = before

    def _asked_for(self, tensor: Tensor) -> bool:
        if not tensor.requires_grad:
            return False
        above = nodes_above(tensor)
        return any(node in self._asking for node in above) or any(
            hasattr(node, "variable") and node not in self.promoted for node in above
        )


def _promoted(call: ForwardPass, sources: list[Source]) -> frozenset[Node]:
    """The leaves of inputs that require no grad where the user trains."""
    asked = {path for path, t in call.given if t.requires_grad}
    leaves = [source.value.node.next_functions[0][0] for source in sources if source.name not in asked]
    return frozenset(leaf for leaf in leaves if leaf is not None)


def _loss(loss: Any, output: Any) -> Tensor | None:
    """The loss; None where it depends on nothing that carries gradient."""
    if not any(tensor.requires_grad for _, tensor in named_tensors(output)):
        return None
    try:
        return scalar_loss(loss, output)
    except UnreachedError:
        return None


def combination(output: Any, seed: int) -> Tensor | None:
    """A random combination of the entries of all outputs that carry gradient."""
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    for _, tensor in named_tensors(output):
        if not (differentiable(tensor) and tensor.requires_grad and tensor.numel()):
            continue
        drawn = normal_from(generator, tensor.shape).to(tensor)
        part = (drawn * tensor).sum().real
        total = part if total is None else total + part.to(total)
    return total


def _differentiate(done: TrainingPass, sources: list[Source]) -> None:
    assert done.loss is not None
    wanted = [*done.parameters.values(), *(source.tensor for source in sources)]
    if not wanted:
        return
    try:
        with _own_gradients(done) as own:
            found = torch.autograd.grad(done.loss, wanted, retain_graph=True, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TraceError(_failed_backward(error)) from error
    done.gradients = dict(zip(done.parameters, found[: len(done.parameters)], strict=True))
    for path, gradient in own.items():
        others = done.gradients[path]
        done.gradients[path] = gradient if others is None else gradient + others
    done.inputs = list(found[len(done.parameters) :])


@contextlib.contextmanager
def _own_gradients(done: TrainingPass) -> Iterator[dict[str, Tensor]]:
    """What functions of the model's own put into ``.grad`` on the way back, as those of reversible networks do."""
    found: dict[str, Tensor] = {}
    if done.loss is None or not any(map(is_python_node, nodes_above(done.loss))):
        yield found
        return
    before = {path: parameter.grad for path, parameter in done.parameters.items()}
    for parameter in done.parameters.values():
        parameter.grad = None
    try:
        yield found
    finally:
        for path, parameter in done.parameters.items():
            if parameter.grad is not None:
                found[path] = parameter.grad
            parameter.grad = before[path]


def _failed_backward(error: RuntimeError) -> str:
    """What the backward pass says that raises, and what that means where it is known."""
    message = " ".join(str(error).split())[:400]
    text = f"the backward pass of the loss fails, as it does in training: {message}"
    if "modified by an inplace operation" in message:
        text += (
            "; something that the gradient needs was written to after it was used: look for +=, x[...] = and functions "
            "that end in _ on tensors of that shape, and make a new tensor there (x = x + y, torch.stack of a list, "
            "x.clone() before the write); torch.autograd.set_detect_anomaly(True) names the line that needed it"
        )
    return text


def _announced(loss: Tensor, observer: Observer) -> list[Any]:
    """Hooks that tell an observer which node runs."""

    def announce(node: Node) -> Any:
        def hook(_grads: Any) -> None:
            observer.node = node

        return node.register_prehook(hook)

    return [announce(node) for node in nodes_above(loss)]


def calling_line() -> str:
    """File and line of the innermost code outside of torch and stabkit that runs within a pass, or nothing."""
    frame = _calling_frame()
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def calling_place() -> str:
    """The same behind the function or method that it lies in, where that has a name: ``Dice.forward, losses.py:12``."""
    frame = _calling_frame()
    if frame is None:
        return ""
    code = frame.f_code
    owner, name = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None, code.co_name
    method = f"{type(owner).__name__}.{name}" if isinstance(owner, nn.Module) else name
    line = f"{Path(code.co_filename).name}:{frame.f_lineno}"
    return line if name.startswith("<") else f"{method}, {line}"


def _calling_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _PASSES and code.co_filename.startswith(LIBRARIES[1]):
            return None
        if not code.co_filename.startswith((*LIBRARIES, "<")):
            return frame
        frame = frame.f_back
    return None


def nodes_above(tensor: Tensor) -> list[Node]:
    """Every autograd node that a tensor was made by."""
    return nodes_from(value_of(tensor).node)


def nodes_from(first: Node) -> list[Node]:
    """An autograd node and every one that leads to it."""
    found: dict[Node, None] = {}
    stack = [first]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found[node] = None
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return list(found)


def path_of(done: TrainingPass, node: Node | None) -> str:
    """Path of the innermost module that an operation ran in, ``""`` outside any."""
    if node is None:
        return ""
    time = node._sequence_nr()
    inside = [call for call in done.calls if call.start <= time and (time < call.stop or call.stop < 0)]
    return inside[-1].path if inside else ""
