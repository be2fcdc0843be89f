"""What the best output that is the same for every sample leaves of a loss: below it, the input was learnt from."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

_LARGE = 1e6
_ROUNDS = 50  # of a quasi-Newton method: mean squared errors take one, cross entropies about ten


def left_by_a_constant(loss: Any, output: Any) -> float | None:
    """The loss of the best constant output, found by L-BFGS; None where no one tensor of several samples is given out.

    Args:
        loss: a callable on the output that returns a scalar.
        output: of the model, with samples along its first axis.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0 or len(output) < 2:
        return None
    mean = output.detach().mean(0, keepdim=True)
    # an output that is near the end of its range, or beyond, is no place to begin at
    constant = torch.where(mean.abs() < _LARGE, mean, torch.zeros_like(mean)).requires_grad_()
    search = torch.optim.LBFGS([constant], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    seen: list[float] = []
    unit: list[float] = []  # the search ends at gradients that are small as numbers, whatever the units of the loss

    def again() -> Tensor:
        search.zero_grad()
        value: Tensor = loss(constant.expand_as(output))
        seen.append(float(value.detach()))
        (slope,) = torch.autograd.grad(value, constant, allow_unused=True)
        slope = torch.zeros_like(constant) if slope is None else slope
        size = float(slope.norm())
        unit.append(size if math.isfinite(size) and size > 0 else 1.0)
        constant.grad = slope / unit[0]
        return value.detach() / unit[0]

    with torch.enable_grad(), contextlib.suppress(RuntimeError, ValueError):
        # a loss of probabilities refuses what the search tries beyond them: the least so far then counts
        search.step(again)  # type: ignore[no-untyped-call]
        seen.append(float(loss(constant.detach().expand_as(output))))
    return min(filter(math.isfinite, seen), default=None)
