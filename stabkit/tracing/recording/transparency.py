"""A context in which every operation of a forward pass leaves differentiable nodes of its own.

Compiled regions, activation checkpoints, fused attention and fused recurrent kernels hide what they do behind
one node, or recompute it later in another context. Inside `transparent` they take their plain, equivalent
path; the values change by rounding at most.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stabkit.turns import turn, undone

_FUSED_RNN = frozenset(getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


class _NoCheckpointFunction:
    """Stands in for the reentrant ``CheckpointFunction``: calls the function and keeps its graph."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


class _OfThread:
    """Stands in for a class whose ``apply`` is called: another one in this thread, the original in all others."""

    def __init__(self, original: Any, other: Any) -> None:
        self.apply = _of_thread(original.apply, other.apply)


def _no_checkpoint_generator(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    yield


# private names differ between versions of torch: those that exist are replaced
_CHECKPOINT_STAND_INS: dict[str, Any] = {
    "CheckpointFunction": _NoCheckpointFunction,
    "_checkpoint_without_reentrant_generator": _no_checkpoint_generator,
    "_checkpoint_without_reentrant_generator_impl": _no_checkpoint_generator,
}


def _plain_cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """``torch.cond`` as the branch that it takes, which is all that one forward pass sees of it."""
    return (true_fn if pred else false_fn)(*operands)


def _of_thread(original: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Another function in this thread, the original in all others, which may be training meanwhile."""
    thread = threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (other if threading.get_ident() == thread else original)(*args, **kwargs)

    return chosen


@contextlib.contextmanager
def replaced(module: Any, name: str, other: Any) -> Iterator[None]:
    """Another function, or class with ``apply``, in the place of one of torch's, for this thread."""
    original = getattr(module, name)
    with undone(lambda: setattr(module, name, original)):
        setattr(module, name, (_OfThread if isinstance(original, type) else _of_thread)(original, other))
        yield


@contextlib.contextmanager
def _compiled_code_eager() -> Iterator[None]:
    """Compiled code runs as it was written.

    To say so imports the compiler, which takes as long as torch itself. Nothing is compiled before something has
    imported it, so without it the wish waits until the pass itself compiles something.
    """
    original = torch.compile
    with contextlib.ExitStack() as stack:

        def compile_eager(*args: Any, **kwargs: Any) -> Any:
            torch.compile = original
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            return original(*args, **kwargs)

        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        else:
            stack.enter_context(replaced(torch, "compile", compile_eager))
        yield


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    """As ``torch.backends.mkldnn.flags(enabled=False)``, which also touches TF32 settings and warns about them."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


#: memory that nobody has written yet
_UNWRITTEN = frozenset({torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty})


#: ``x.requires_grad = ...``
_ASK_GRADIENT = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]
#: how a tensor is taken off its graph
DETACHING: dict[Any, str] = {
    torch.detach: "detach",
    torch.Tensor.detach: "detach",
    torch.Tensor.detach_: "detach_",
    torch.Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
}
#: how a tensor is made to require grad
_ASKING = (torch.Tensor.requires_grad_, _ASK_GRADIENT)


def _zeroed(tensor: Any) -> Any:
    floats = isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())
    if floats and not tensor.is_meta:
        tensor.detach().zero_()
    return tensor


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that is entered only where compiled code runs eagerly.

    Its own code needs no hiding from the compiler, which torch would import to hide it from.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class PlainKernels(TorchFunctionMode):
    """Recurrent kernels take their composite path; ``no_grad`` and ``detach`` are looked through when asked.

    A model may ask for a gradient of its input, as those with a frozen front do; the input is on the graph already.
    Memory that a model fills by and by, as a solver does with its stages, begins with zeros: what stands there before
    is part of the states in between, and would be of any size.
    """

    def __init__(self, through_no_grad: bool = False, training: Any = None, through_detach: bool = False) -> None:
        super().__init__()
        self.through_no_grad = through_no_grad
        self.through_detach = through_detach
        self.training = training

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.through_no_grad and func is torch._C._set_grad_enabled:
            return None
        if self.through_detach and func in DETACHING:
            return args[0] if DETACHING[func].endswith("_") else args[0].view_as(args[0])
        if self.training is not None:
            self._told(func, args, kwargs)
        if func == _ASK_GRADIENT and args[1] and args[0].requires_grad:
            return None  # which torch refuses of what is no leaf, although it has what is asked for
        if func in _UNWRITTEN:
            return _zeroed(func(*args, **kwargs))
        if func in _FUSED_RNN:  # the fused kernels have no double backward
            with _without_mkldnn(), torch.backends.cudnn.flags(enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _told(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the stand-in for training what it cannot see by itself."""
        if func in _ASKING:
            self.training.ask(args[0])
        elif func in DETACHING:
            self.training.detached += 1
        elif func is torch._C._set_grad_enabled:
            self.training.without_graph |= not args[0]
        elif func is torch.autograd.grad:
            self.training.without_graph |= not kwargs.get("create_graph", len(args) > 4 and args[4])


@contextlib.contextmanager
def transparent(through_no_grad: bool = False, training: Any = None, *, through_detach: bool = False) -> Iterator[None]:
    """Run a forward pass eagerly, with gradients, without fusion and without recomputation.

    Args:
        through_no_grad: ignore ``torch.no_grad``.
        training: what stands in for the reentrant ``CheckpointFunction``, and is told (``ask``) of the tensors that are
            made to require grad, (``without_graph``) that something ran off the graph, and (``detached``) how often
            something was taken off it; None calls the function that is checkpointed, and no more.
        through_detach: pass on what is detached, as another view of it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(turn())
        stand_ins = dict(_CHECKPOINT_STAND_INS)
        if training is not None:
            stand_ins["CheckpointFunction"] = training
        for name, other in stand_ins.items():
            if hasattr(torch.utils.checkpoint, name):
                stack.enter_context(replaced(torch.utils.checkpoint, name, other))
        stack.enter_context(replaced(torch, "cond", _plain_cond))
        stack.enter_context(_compiled_code_eager())
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(torch.jit.optimized_execution(False))  # type: ignore[attr-defined]
        stack.enter_context(torch.enable_grad())
        stack.enter_context(PlainKernels(through_no_grad, training, through_detach))
        yield
