"""Settings of an optimizer that keep it from what it is there for: it climbs the loss, or leaves some parameters still.

Both may be meant: a reward is to be climbed, and layers are held still for a while. So they are told where the loss is
an error, which is never below zero, and where the same updates without the setting end clearly lower.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import nn

from stabkit.curvature.batches import Batches
from stabkit.curvature.hessian import Hessian
from stabkit.curvature.twin import Twin
from stabkit.curvature.updates import trained_by
from stabkit.diagnosis.finding import Finding, of_training
from stabkit.diagnosis.losses.signs import signs_of
from stabkit.diagnosis.remedies.given_optimizer import climbs
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.diagnosis.updates.idle import is_scheduled
from stabkit.diagnosis.updates.measured import STEPS
from stabkit.errors import StabkitError
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.untouched_model import unchanged

_TIMES = 1.5  # as far as it falls, that a loss must fall with a group that moves
_HEAVY, _USUAL = 0.99, 0.9  # momenta: above the first, what is tried; the one that it is held against
_LONG, _LAST = 200, 50  # updates of that trial, and those at its end of which the median counts
_NO_LOWER, _LEARNS = 0.9, 0.5  # of the first loss, above which nothing is learnt, and below which the usual one learns
_GAIN = 0.05  # of the first loss, that must be gained besides
_REFERENCE = "https://docs.pytorch.org/docs/stable/optim.html#per-parameter-options"


def setting_findings(run: TrainingRun, optimizer: torch.optim.Optimizer) -> list[Finding]:
    """What the settings of an optimizer do, tried on copies of it."""
    model, call = run.call.module, run.call
    if run.done.loss is None or not (climbs(optimizer) or _still(optimizer) or _heavy(optimizer)):
        return []
    with unchanged(model):
        try:
            batches = Batches(call.inputs, call.kwargs, run.loss, None)
            hessian = Hessian(model, trained_by(optimizer, model), batches, call.seed)
            if climbs(optimizer):
                return _of_climbing(run, optimizer, hessian)
            return (
                _of_still_groups(model, optimizer, hessian) if _still(optimizer) else _of_momentum(optimizer, hessian)
            )
        except StabkitError:
            return []  # an optimizer that makes no updates by itself, as is noted


def _still(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters of groups that have no learning rate, beside others that have one; none under a schedule."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if is_scheduled(optimizer) or not max(rates) > 0:
        return []
    groups = [group["params"] for group, rate in zip(optimizer.param_groups, rates, strict=True) if rate == 0]
    return [p for group in groups for p in group if p.requires_grad]


def _heavy(optimizer: torch.optim.Optimizer) -> float:
    """A momentum that keeps hundreds of updates; 0 for a usual one."""
    most = max((float(group.get("momentum") or 0.0) for group in optimizer.param_groups), default=0.0)
    return most if most > _HEAVY else 0.0


def _of_momentum(optimizer: torch.optim.Optimizer, hessian: Hessian) -> list[Finding]:
    """A momentum that carries the loss back up, beside the usual one."""

    def usual(group: dict[str, Any]) -> None:
        group["momentum"] = min(float(group.get("momentum") or 0.0), _USUAL)

    plain, light = (Twin(hessian, optimizer, 1.0, change).losses(_LONG) for change in (None, usual))
    ends = [statistics.median(run[-_LAST:]) if len(run) > _LONG else math.inf for run in (plain, light)]
    if not (ends[0] > _NO_LOWER * plain[0] and ends[1] < _LEARNS * plain[0]):
        return []
    name, momentum = type(optimizer).__name__, _heavy(optimizer)
    evidence = (
        f"the momentum {momentum:g} of {name} sums {1 / (1 - momentum):.0f} gradients, which is as good as a rate so "
        f"many times as large: {_LONG} updates on this batch take the loss from {plain[0]:.3g} by way of "
        f"{max(plain):.3g} to {ends[0]:.3g} (median of the last {_LAST}), and with "
        f"a momentum of {_USUAL:g} to {ends[1]:.3g}"
    )
    numbers = {"momentum": momentum, "loss": plain[0], "end": ends[0], "other": ends[1]}
    remedy = f"momentum={_USUAL:g}; a larger one asks for a rate that is as many times as small"
    return [of_training("unstable_update", "warning", evidence, remedy, _REFERENCE, numbers)]


def _of_climbing(run: TrainingRun, optimizer: torch.optim.Optimizer, hessian: Hessian) -> list[Finding]:
    assert run.done.loss is not None
    if not signs_of(run.done.loss.grad_fn).positive:
        return []

    def turned(group: dict[str, Any]) -> None:
        group["maximize"] = False

    plain, down = (Twin(hessian, optimizer, 1.0, change).losses(STEPS) for change in (None, turned))
    if not (plain[-1] > plain[0] or not math.isfinite(plain[-1])) or not down[-1] < down[0]:
        return []
    name = type(optimizer).__name__
    evidence = (
        f"{name} is set to maximize=True, and the loss is an error, which is never below zero: {STEPS} updates on this "
        f"batch take it from {plain[0]:.3g} to {plain[-1]:.3g}, and with maximize=False to {down[-1]:.3g}"
    )
    numbers = {"loss": plain[0], "end": plain[-1], "other": down[-1]}
    return [of_training("unstable_update", "critical", evidence, "maximize=False", _REFERENCE, numbers)]


def _of_still_groups(model: nn.Module, optimizer: torch.optim.Optimizer, hessian: Hessian) -> list[Finding]:
    still = {id(p) for p in _still(optimizer)}
    names = tuple(path for path, p in model.named_parameters() if id(p) in still)
    rate = max(float(group["lr"]) for group in optimizer.param_groups)

    def moving(group: dict[str, Any]) -> None:
        group["lr"] = rate if group["lr"] == 0 else group["lr"]

    plain, moved = (Twin(hessian, optimizer, 1.0, change).losses(STEPS) for change in (None, moving))
    first = plain[0]
    gained = (first - moved[-1]) - (first - plain[-1])
    if not (first - moved[-1] > _TIMES * (first - plain[-1]) and gained > _GAIN * abs(first)):
        return []
    evidence = (
        f"{len(names)} parameters that are to be trained ({listed(names)}) are in a group of "
        f"{type(optimizer).__name__} whose learning rate is 0, and never move: {STEPS} updates on this batch take "
        f"the loss from {first:.3g} to {plain[-1]:.3g}, and with {rate:g} for that group to {moved[-1]:.3g}"
    )
    remedy = f"give that group a learning rate, as the {rate:g} of the others; or set requires_grad_(False)"
    numbers = {"parameters": float(len(names)), "loss": first, "end": plain[-1], "other": moved[-1]}
    return [of_training("idle_update", "warning", evidence, remedy, _REFERENCE, numbers)]
