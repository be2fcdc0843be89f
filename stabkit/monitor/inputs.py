"""The calls of the model in a recorded step, and what it takes to run them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.capsule_loading import output_tensors
from stabkit.checkpoints.capsules import RecordedCall
from stabkit.checkpoints.randomness import RandomState, as_tensors, random_state
from stabkit.monitor.measurement import Failed, in_backward
from stabkit.monitor.watching import watch
from stabkit.tracing.recording.containers import map_tensors
from stabkit.vocabulary import norm_of

MOST_CALLS = 64  # of one step (micro-batches) that are kept


@dataclass
class Captured:
    """One forward call of the model.

    Attributes:
        args: positional arguments, by reference.
        kwargs: keyword arguments, by reference.
        random: state of the random generators before the call.
        buffers: buffers that the call may change, as they were before it.
        gradients: gradients of the loss with respect to the tensors of the output, scaled as they were.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def to_call(self) -> RecordedCall:
        """The call with its tensors on the host, for a capsule."""

        def host(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu()

        return RecordedCall(
            args=map_tensors(self.args, host),
            kwargs=map_tensors(self.kwargs, host),
            random=as_tensors(self.random),
            buffers={name: host(tensor) for name, tensor in self.buffers.items()},
            gradients={name: host(tensor) for name, tensor in self.gradients.items()},
        )


class RecordedInputs:
    """Keeps references to the arguments of the model's calls, during a step that is recorded.

    Args:
        model: as it is called.
        inner: the model without its wrappers, whose buffers count.
        failed: told of an error inside a hook.
        enabled: whether anybody wants them.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, failed: Failed, *, enabled: bool) -> None:
        self._model = model
        self._inner = inner
        self._failed = failed
        self._enabled = enabled
        self._undo: Callable[[], None] | None = None
        self._open: Captured | None = None
        self._volatile: list[str] | None = None  # buffers that a call changes; None before the first call
        self._versions: dict[str, int] = {}
        self.captured: list[Captured] = []
        self.complete = True

    def on(self) -> None:
        """Hold the coming calls, and let go of those before."""
        self.captured, self.complete = [], True
        if self._enabled and self._undo is None:
            self._undo = watch(self._model, self._after, self._before)

    def off(self) -> None:
        """Stop, and let go of the batch."""
        if self._undo is not None:
            self._undo()
        self._undo, self._open = None, None
        self.captured = []

    def pause(self) -> None:
        """Stop, but keep what is held."""
        held = self.captured
        self.off()
        self.captured = held

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or in_backward():
            return
        try:
            self._open = Captured(args, dict(kwargs), random_state(), self._buffers())
        except Exception as error:
            self._failed(error)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open is None:
            return
        captured, self._open = self._open, None
        try:
            self._learn_buffers(captured)
            self._ask(captured, output)
            self.captured.append(captured)
            if len(self.captured) > MOST_CALLS:
                del self.captured[0]
                self.complete = False
        except Exception as error:
            self._failed(error)

    def _ask(self, captured: Captured, output: Any) -> None:
        tensors = output_tensors(output)
        losses = {number for number, tensor in tensors.items() if tensor.dim() == 0}

        def keeper(number: str) -> Callable[[Tensor], None]:
            def keep(gradient: Tensor) -> None:
                # where the loss is an output itself, the gradients of the others came through it and are not needed
                if number in losses or not losses & captured.gradients.keys():
                    captured.gradients[number] = gradient.detach() if gradient.requires_grad else gradient

            return keep

        for number, tensor in tensors.items():
            tensor.register_hook(keeper(number))  # type: ignore[no-untyped-call]

    def _buffers(self) -> dict[str, Tensor]:
        known = _loose_buffers(self._inner) if self._volatile is None else dict(self._inner.named_buffers())
        if self._volatile is None:
            self._versions = {name: buffer._version for name, buffer in known.items()}
        names = known if self._volatile is None else self._volatile
        return {name: known[name].detach().clone() for name in names if name in known}

    def _learn_buffers(self, captured: Captured) -> None:
        if self._volatile is None:
            now = dict(self._inner.named_buffers())
            self._volatile = [n for n, v in self._versions.items() if n not in now or now[n]._version != v]
            captured.buffers = {name: captured.buffers[name] for name in self._volatile}


def _loose_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that may matter to what a call in training mode returns: all but running statistics."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        if (norm := norm_of(part)) is None or not norm.running
        for name, buffer in part.named_buffers(recurse=False)
    }
