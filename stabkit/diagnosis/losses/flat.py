"""Losses that are flat where outputs stand, though other outputs would lower them: no gradient says which way to go.

An IoU of boxes that do not meet, a score behind a clamp, a threshold. A gradient of zero is right where a sample is
satisfied, as beyond a margin, and where a loss leaves it out; so other outputs are tried for single samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding, of_last_step
from stabkit.diagnosis.losses.stops import flat_stop
from stabkit.tracing import Flow

_HALF = 0.5  # of the samples, from which so many without gradient are a fault
_TRIED = 8  # samples that other outputs are tried for
_FEWEST = 2  # of these that must be better off: what is satisfied, or left out, never is
_PROPOSALS = 96  # other outputs of each
_MOST = 100_000  # numbers of an output, of which so many losses are no small part of a diagnosis
_SIZES = (0.5, 2.0, 8.0)  # of the spread of the outputs: how far these lie
_LOWER = 1e-3  # of the loss, over the number of samples: what is no rounding
_GIOU = "Rezatofighi et al., Generalized intersection over union, 2019"


def flat_loss_findings(flow: Flow, loss: Any, scalar: Tensor) -> list[Finding]:
    """A finding where a loss has no gradient by most or all of the samples of an output, and is not at its least."""
    value = float(scalar.detach())
    edges = [v.edge for v in flow.states[-1].values]
    gradients = torch.autograd.grad(scalar, edges, retain_graph=True, allow_unused=True)
    if value != 0.0 and all(g is not None and not bool((g != 0).any()) for g in gradients):
        evidence = f"the loss is {value:.3g} and its gradient by the output is zero everywhere"
        return [_finding(flow, loss, None, "critical", evidence, {"loss": value})]
    return _of_most_samples(flow, loss, value)


def _has_rows(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() > 0 and len(output) > 1 and output.is_floating_point()


def _of_most_samples(flow: Flow, loss: Any, value: float) -> list[Finding]:
    """The same of most samples, where single ones would be better off with other outputs."""
    if not _has_rows(flow.output) or not math.isfinite(value) or flow.output.numel() > _MOST:
        return []
    output = flow.output.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(output), [output], allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()):
        return []
    still = (gradient == 0).flatten(1).all(1) if gradient.dim() > 1 else gradient == 0
    if float(still.double().mean()) < _HALF or bool(still.all()):
        return []
    chosen = still.nonzero().flatten()[:: max(1, int(still.sum()) // _TRIED)][:_TRIED].tolist()
    better = sum(_can_be_lower(loss, output.detach(), row, value) for row in chosen)
    if better < _FEWEST:
        return []
    evidence = (
        f"the loss has no gradient by the outputs of {int(still.sum())} of {len(still)} samples, and is not at its "
        f"least there: other outputs, drawn at random, lower it for {better} of {len(chosen)} of them that were tried"
    )
    numbers = {"loss": value, "share": float(still.double().mean())}
    return [_finding(flow, loss, still, "warning", evidence, numbers)]


def _can_be_lower(loss: Any, output: Tensor, row: int, value: float) -> bool:
    """Whether some other output of one sample lowers the loss."""
    generator = torch.Generator().manual_seed(row)
    spread = float(output.double().std()) or 1.0
    low, high = output.amin(0), output.amax(0)
    with torch.no_grad():
        shares = bool(((low >= 0) & (high <= 1)).all())  # probabilities, or what else stays between 0 and 1
        for index in range(_PROPOSALS):
            size = _SIZES[index % len(_SIZES)] * spread
            drawn = torch.randn(output.shape[1:], generator=generator, dtype=torch.float64)
            other = output.clone()
            middle = output[row] if index % 2 else (low + high) / 2
            other[row] = middle + (size * drawn).to(output)
            other = other.clamp(0, 1) if shares else other
            found = _read(loss, other)
            if math.isfinite(found) and found < value - _LOWER * abs(value) / len(output):
                return True
    return False


def _read(loss: Any, output: Tensor) -> float:
    """A loss of other outputs; NaN where it does not take them, such as numbers that are no probabilities."""
    try:
        return float(loss(output))
    except (RuntimeError, ValueError, AssertionError):
        return math.nan


def _finding(
    flow: Flow, loss: Any, rows: Tensor | None, severity: str, evidence: str, numbers: dict[str, float]
) -> Finding:
    stop = flat_stop(loss, flow.output, rows)
    remedy = "look for what has no slope in the loss: nothing can be learnt from it"
    if stop is not None:
        evidence, remedy = f"{evidence}; {stop.words}", stop.remedy
    reference = _GIOU if stop is not None and stop.boxes else ""
    return of_last_step(flow, "loss", severity, "loss", evidence, remedy, reference, numbers)
