"""Gradients that are zero in half precision and are not when the loss is multiplied by a power of two.

The smallest number of float16 is 6e-8. A gradient below it is lost on its way back, whatever the network is like, so a
diagnosis would take the layers for dead. What is lost is measured: the same pass with the loss scaled, which changes
nothing but the range in which the gradients lie. Everything else is then diagnosed with the scaled loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding
from stabkit.diagnosis.remedies.short_training import ShortTraining, compared, short_training
from stabkit.tracing import Flow
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above, training_pass

#: powers of two that the loss is multiplied by, the first with which all stays finite; GradScaler begins with the first
_POWERS = (16, 12, 8, 4)
_MOST = 0.5  # share of the gradient entries that are lost from which it is more than small ones beside large ones
_ALL = 0.9  # share from which next to nothing is left to train with
_CLEARLY = 0.02  # of the first loss: by how much a short training must end lower with the loss scaled
_MICIKEVICIUS = "Micikevicius et al., Mixed precision training, 2018, section 3.2"


@dataclass(frozen=True)
class ScaledLoss:
    """A loss times a power of two."""

    loss: Callable[[Any], Tensor]
    factor: float

    @property
    def __name__(self) -> str:
        return str(getattr(self.loss, "__name__", type(self.loss).__name__))

    def __call__(self, output: Any) -> Tensor:
        """The loss of an output, scaled."""
        return self.loss(output) * self.factor


@dataclass(frozen=True)
class GradientUnderflow:
    """What is lost, and the loss with which it is not."""

    finding: Finding
    loss: ScaledLoss


def gradient_underflow(flow: Flow, loss: Any) -> GradientUnderflow | None:
    """Gradients that are lost to float16; None where none are, or nothing is computed in it, or there is no loss.

    Losing many small entries beside the large ones that matter does no harm: so it is a warning where a short training
    ends lower with the loss scaled, or next to nothing is left.
    """
    if not callable(loss) or not _in_half(flow, loss):
        return None
    call = flow.forward_pass
    plain = training_pass(call, loss)
    if plain.loss is None or not bool(plain.loss.detach().isfinite()) or not _all_finite(plain):
        return None
    for power in _POWERS:
        scaled = ScaledLoss(loss, 2.0**power)
        done = training_pass(call, scaled)
        if _all_finite(done):
            break
    else:
        return None
    there, gone, typical = _compared(plain, done)
    share = gone / there if there else 0.0
    if share <= _MOST:
        return None
    as_it_is, treated = short_training(flow, loss), short_training(flow, scaled)
    if treated is not None:
        treated = ShortTraining(treated.first / scaled.factor, treated.last / scaled.factor)
    helps = as_it_is is not None and treated is not None and _better(treated, as_it_is)
    if not helps and (share <= _ALL or (as_it_is is not None and treated is not None)):
        return None
    return GradientUnderflow(_finding(flow, share, there, typical / scaled.factor, power, as_it_is, treated), scaled)


def _in_half(flow: Flow, loss: Any) -> bool:
    for node in nodes_above(scalar_loss(loss, flow.output)):
        metas: Any = getattr(node, "_input_metadata", ())
        if any(meta.dtype == torch.float16 for meta in metas):
            return True
    return False


def _gradients(done: TrainingPass) -> list[Tensor]:
    found = [g for g in done.gradients.values() if g is not None] or [g for g in done.inputs if g is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in found]


def _all_finite(done: TrainingPass) -> bool:
    return all(bool(g.isfinite().all()) for g in _gradients(done))


def _compared(plain: TrainingPass, scaled: TrainingPass) -> tuple[int, int, float]:
    """How many entries are not zero when scaled, how many of these are as it is, and their typical scaled size."""
    there = gone = 0
    sizes = []
    for one, other in zip(_gradients(plain), _gradients(scaled), strict=True):
        held = other != 0
        there += int(held.sum())
        gone += int((held & (one == 0)).sum())
        sizes.append(other[held].detach().abs().flatten().float())
    every = torch.cat(sizes) if sizes else torch.zeros(0)
    return there, gone, float(every.median()) if every.numel() else math.nan


def _better(treated: ShortTraining, plain: ShortTraining) -> bool:
    return treated.last < plain.last - _CLEARLY * abs(plain.first)


def _finding(
    flow: Flow,
    share: float,
    there: int,
    typical: float,
    power: int,
    plain: ShortTraining | None,
    treated: ShortTraining | None,
) -> Finding:
    limits = torch.finfo(torch.float16)
    smallest = limits.smallest_normal * limits.eps
    evidence = (
        f"gradients underflow float16, whose smallest number is {smallest:.2g}: {share:.0%} of the {there} entries "
        f"that are not zero when the loss is multiplied by 2**{power} are exactly zero as it is; a typical one is "
        f"{typical:.2g}"
    )
    evidence += compared(plain, treated, "with the loss scaled")
    remedy = (
        f"scale the loss: torch.amp.GradScaler multiplies it by 2**{_POWERS[0]} before the backward pass and divides "
        "the gradients of the weights by it before the step; or compute in bfloat16, which reaches as far down as "
        "float32"
    )
    if any(p.dtype == torch.float16 for p in flow.model.parameters()):
        remedy += "; keep the weights in float32 (torch.autocast), since their gradients are divided in their dtype"
    return Finding(
        kind="precision_loss",
        severity="critical" if share > _ALL else "warning",
        steps=tuple(range(len(flow.steps))),
        module_path=LOSS,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference=_MICIKEVICIUS,
        numbers={"share": share, "typical": typical, "power": float(power)},
    )
