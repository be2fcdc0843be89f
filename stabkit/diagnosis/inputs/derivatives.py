"""Derivatives that a model takes itself, as networks of equations do: of inputs in other units they are others."""

from __future__ import annotations

from typing import Any

import torch

from stabkit.diagnosis.remedies.made_once import once
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.training_pass import Observer, training_pass


def differentiates(call: ForwardPass, loss: Any = None) -> bool:
    """Whether the model or the loss takes derivatives: inputs that are scaled where data are read make them others.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar; None asks of the model alone.
    """
    return once(lambda: _taken(call, loss), call, (loss,), "derivatives")


def _taken(call: ForwardPass, loss: Any) -> bool:
    watch = _Derivatives()
    training_pass(call, loss, Observer(watch), differentiate=False)
    return watch.taken


class _Derivatives(FunctionCalls):
    """Notes whether a derivative is taken within a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.taken = self.taken or func in (torch.autograd.grad, torch.autograd.backward)
        return func(*args, **kwargs)
