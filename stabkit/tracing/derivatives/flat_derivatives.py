"""Derivatives that a model takes of itself and that are zero, because an activation is linear between its kinks.

A physics-informed network is differentiated by its input, often twice. Of a ReLU the first derivative is a step and the
second is zero wherever it is computed, so what is made of a second derivative holds no parameter to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.training_pass import Observer, calling_line, nodes_above, training_pass
from stabkit.vocabulary import activation_of

# derivatives of the derivatives of activations that are linear between their kinks, as autograd names them
_TWICE = {
    "ThresholdBackwardBackward": "ReLU",
    "LeakyReluBackwardBackward": "LeakyReLU",
    "HardtanhBackwardBackward": "Hardtanh",
    "PreluKernelBackwardBackward": "PReLU",
    "RreluWithNoiseBackwardBackward": "RReLU",
    "SoftshrinkBackwardBackward": "Softshrink",
    "HardshrinkBackwardBackward": "Hardshrink",
}


@dataclass(frozen=True)
class FlatDerivative:
    """A derivative that is zero everywhere, since it is the second of activations that are linear between their kinks.

    Attributes:
        activations: their names.
        paths: the modules that compute them; empty where they are called as functions.
        line: file and line that take the derivative, outside of libraries; empty where there is none.
        part: ``"model"`` or ``"loss"``: where it is taken.
        parameters: those whose gradient of the loss is zero or missing, by path.
        trainable: how many parameters there are.
    """

    activations: tuple[str, ...]
    paths: tuple[str, ...]
    line: str
    part: str
    parameters: tuple[str, ...]
    trainable: int


def differentiated_twice(nodes: list[Node]) -> tuple[str, ...]:
    """The activations, linear between their kinks, whose derivatives are on a graph."""
    names = (node.name().rstrip("0123456789") for node in nodes)
    return tuple(dict.fromkeys(_TWICE[name] for name in names if name in _TWICE))


def flat_derivatives(call: ForwardPass, loss: Any = None) -> tuple[FlatDerivative, ...]:
    """The derivatives taken in a training pass that are zero for this reason, one for each line that takes them.

    Raises:
        TraceError: the model or the loss fails.
    """
    watch = _Derivatives()
    done = training_pass(call, loss, watch)
    still = tuple(path for path, g in done.gradients.items() if g is None or not bool((g != 0).any()))
    bent = {c.path: facts.name for c in done.calls if (facts := activation_of(c.module)) and facts.piecewise_linear}
    return tuple(
        FlatDerivative(names, tuple(filter(None, bent)), line, part, still, len(done.parameters))
        for (line, part), names in watch.found.items()
    )


class _Derivatives(Observer):  # type: ignore[no-untyped-call]
    """Sees the calls of ``torch.autograd.grad`` that a model or a loss makes.

    Attributes:
        found: activations, by the line and the part of the pass that took a derivative which is zero.
    """

    def __init__(self) -> None:
        super().__init__(_Gradients(self))
        self.found: dict[tuple[str, str], tuple[str, ...]] = {}

    def differentiated(self, outputs: Any, results: Any) -> None:
        """Note a derivative that is zero everywhere."""
        if self.part == "backward" or any(r is not None and bool((r.detach() != 0).any()) for r in results):
            return
        given = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        nodes = [node for tensor in given if isinstance(tensor, Tensor) for node in nodes_above(tensor)]
        names = differentiated_twice(nodes)
        if names:
            self.found.setdefault((calling_line(), self.part), names)


class _Gradients(FunctionCalls):
    """Sees derivatives being taken."""

    def __init__(self, watch: _Derivatives) -> None:
        super().__init__()
        self.watch = watch

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func is torch.autograd.grad:
            self.watch.differentiated(args[0] if args else kwargs["outputs"], result)
        return result
