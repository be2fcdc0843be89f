"""Whether a model learns from its input at the usual rates: a few steps of Adam beside the best constant output."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.usual_training import adams, left_after
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass

_LARGE = 1e6
_ROUNDS = 50  # of a quasi-Newton method: mean squared errors take one, cross entropies about ten


def beside_a_constant(call: ForwardPass, loss: Any) -> float | None:
    """The loss as it is, over what the best constant output leaves of it; None where unknown."""
    done = training_pass(call, loss, differentiate=False)
    floor = left_by_a_constant(loss, done.output) if done.loss is not None else None
    return None if floor is None or done.loss is None or not floor > 0 else float(done.loss.detach()) / floor


def left_beside_a_constant(call: ForwardPass, loss: Any, actions: Sequence[Action] = ()) -> float | None:
    """What a few steps of Adam leave of a loss, over what the best constant output leaves of it; None where unknown."""
    done = training_pass(call, loss, differentiate=False)
    floor = left_by_a_constant(loss, done.output) if done.loss is not None else None
    if floor is None or done.loss is None or not floor > 0:
        return None
    first, left = done.loss, left_after(call, loss, adams(floor), actions)
    if actions and left is not None:
        with carried_out(call.module, actions):
            treated = training_pass(call, loss, differentiate=False).loss
        first = first if treated is None else treated
    return None if left is None else left * float(first.detach()) / floor


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
