"""What every module of a model returns in one pass, to be compared with what it returns in another."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from stabkit.tracing.recording.containers import named_tensors


class ModuleOutputs(contextlib.AbstractContextManager[Any]):
    """Keeps what every module returns, in the order in which they end, and what it was given.

    Attributes:
        made: path and first output of each.
        given: what it was given, in the same order; None where that is no tensor of floats.
    """

    def __init__(self, model: nn.Module) -> None:
        self.made: list[tuple[str, Tensor]] = []
        self.given: list[Tensor | None] = []
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        self._handles = [m.register_forward_hook(self._noting(path)) for path, m in self._model.named_modules()]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _noting(self, path: str) -> Any:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            for tensor in float_outputs(output)[:1]:
                self.made.append((path, tensor.clone()))
                self.given.append(next(iter(float_outputs(args)), None))

        return hook


def float_outputs(output: Any) -> list[Tensor]:
    """Tensors of floats with an axis of samples and another, detached."""
    return [t.detach() for _, t in named_tensors(output) if t.is_floating_point() and t.dim() > 1]
