"""By how much a training loop shortens its gradient between the backward pass and the update, as clipping does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_WHOLE = 0.99  # of the norm: what rounding leaves of a gradient that nothing shortens is nearer to 1, also in bfloat16


class Shortening:
    """Compares the gradient of one small parameter as it was made with what is there at ``monitor.step``.

    Args:
        model: whose parameters get the gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
        several = [p for p in trained if p.numel() > 1] or trained
        self._parameter: Any = min(several, key=lambda p: p.numel(), default=None)
        self._handle: Any = None
        self._made: Tensor | None = None

    def on(self) -> None:
        """Note the gradient of the coming backward pass."""
        self._made = None
        if self._handle is None and self._parameter is not None:
            self._handle = self._parameter.register_post_accumulate_grad_hook(self._note)

    def off(self) -> None:
        """No hook stays behind."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def factor(self, scale: float = 1.0) -> float:
        """The part of its length that the gradient still has; 1 where nothing shortens it, or nothing is known.

        Args:
            scale: by what a loss scaler has divided it since.
        """
        made, self._made = self._made, None
        if made is None or self._parameter.grad is None:
            return 1.0
        before, now = float(made), float(_norm(self._parameter.grad)) * scale
        if not (0 < before < math.inf and 0 < now < _WHOLE * before):
            return 1.0
        return now / before

    def _note(self, parameter: Tensor) -> None:
        self._made = None if parameter.grad is None else _norm(parameter.grad)


def _norm(gradient: Tensor) -> Tensor:
    held = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
    norm: Tensor = torch.linalg.vector_norm(held.detach(), dtype=torch.float32)
    return norm
