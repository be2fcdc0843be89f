"""What the best output that is the same for every sample leaves of a loss: below it, the input was learnt from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_ROUNDS = 50  # of a quasi-Newton method: mean squared errors take one, cross entropies about ten


def left_by_a_constant(loss: Any, output: Any) -> float | None:
    """The loss of the best constant output, found by L-BFGS; None where no one tensor of several samples is given out.

    Args:
        loss: a callable on the output that returns a scalar.
        output: of the model, with samples along its first axis.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0 or len(output) < 2:
        return None
    constant = output.detach().mean(0, keepdim=True).clone().requires_grad_()
    search = torch.optim.LBFGS([constant], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def again() -> Tensor:
        search.zero_grad()
        value: Tensor = loss(constant.expand_as(output))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    with torch.enable_grad():
        first = float(search.step(again))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        last = float(loss(constant.expand_as(output)))
    known = [value for value in (first, last) if math.isfinite(value)]
    return min(known, default=None)
