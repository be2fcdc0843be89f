"""Whether the loss that a monitor is told is the one whose gradient was taken, or that of another unit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.monitor.measurement import first_tensor, in_backward
from stabkit.monitor.watching import watch
from stabkit.tracing.graph.values import operation

# The largest curvature of a sum over samples in the output, of the usual losses: 2 of squares, 1/2 of cross entropies.
_CURVES = 2.0
_ROUNDING = 1.01
_LINEAR = frozenset({"Add", "Mul", "Div", "Neg", "Squeeze", "View"})
_DEEPEST = 8
_MEAN, _SUM = 1, 2  # reductions of torch


class Units:
    """Looks at the gradient in the model's output in the first step.

    A loss that is never negative and curves by at most c has a gradient whose square is at most 2 c times the loss: c
    is 2 for a sum over samples and 2 / n for the mean over n. Where the mean is told and backward was called on the
    sum, the square is n^2 times what it would be. Of losses whose sums and means are not found nothing is said.

    Args:
        model: as it is called.

    Attributes:
        differ: whether it is of another unit for sure.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: list[tuple[Tensor, Tensor]] = []  # outputs of this step, their gradients squared
        self._undo: Any = None
        self._output: Tensor | None = None
        self._known = False
        self.differ = False

    def on(self) -> None:
        """Watch the coming calls, unless the first step is over."""
        if self._undo is None and not self._known:
            self._undo = watch(self._model, self._after)

    def off(self) -> None:
        """No hook stays behind."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._seen.clear()

    def see(self, loss: Tensor | float | None, scale: Tensor | float) -> None:
        """Compare the loss with the gradients of the step; call it after ``backward``.

        Args:
            loss: that was told.
            scale: what a loss scaler has multiplied it by before ``backward``.
        """
        if self._undo is None:
            return
        if isinstance(loss, Tensor) and loss.grad_fn is not None and self._seen:
            output, squares = self._seen[-1]
            self.differ = not _agree(loss, output, float(squares) / float(scale) ** 2)
        self._known = True
        self.off()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output) if torch.is_grad_enabled() and not in_backward() else None
        if tensor is None or tensor.grad_fn is None or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return
        kept, number = tensor.detach(), tensor.output_nr

        def take(arrived: Any) -> None:
            if arrived[number] is not None:
                self._seen[-1:] = [(kept, arrived[number].detach().float().square().sum())]

        tensor.grad_fn.register_prehook(take)


def _agree(loss: Tensor, output: Tensor, squares: float) -> bool:
    value = float(loss.detach())
    if output.numel() == 1:  # the model returns its loss
        return squares <= _ROUNDING
    found = list(_reductions(loss.grad_fn, 1.0, 0))
    if not found or None in found or not math.isfinite(squares) or not value > 0.0:
        return True
    samples = output.numel() // max(output.shape[1:], default=1)
    curves = max(factor * _CURVES / (samples if mean else 1) for mean, factor in found)  # type: ignore[misc]
    return squares <= _ROUNDING * 2.0 * curves * value


def _reductions(node: Any, factor: float, depth: int) -> Iterator[tuple[bool, float] | None]:
    """The sums and means that make up a loss: whether it is a mean, and what it is multiplied by; None for others.

    A factor that the backward pass has freed was passed by it, and cannot be read.
    """
    name = operation(node)
    reduction = getattr(node, "_saved_reduction", None)
    if name in ("Mean", "Sum") or reduction in (_MEAN, _SUM):
        yield name == "Mean" or reduction == _MEAN, factor
    elif name not in _LINEAR or depth > _DEEPEST:
        yield None
    else:
        if name in ("Mul", "Div"):
            number = _constant(node)
            if not number:
                yield None
                return
            factor = factor * number if name == "Mul" else factor / number
        for parent, _ in node.next_functions:
            if parent is not None:
                yield from _reductions(parent, abs(factor), depth + 1)


def _constant(node: Any) -> float:
    """The number that a product has besides, 0 where it has none or it is gone."""
    for name in ("_saved_other", "_saved_self"):
        try:
            held = getattr(node, name, None)
        except RuntimeError:  # freed
            return 0.0
        if isinstance(held, int | float) or (isinstance(held, Tensor) and held.numel() == 1):
            return float(held)
    return 0.0
