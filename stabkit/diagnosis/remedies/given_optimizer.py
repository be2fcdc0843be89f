"""A few steps of the optimizer that is given, with its own settings and state, on copies of model and optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.curvature.batches import Batches
from stabkit.curvature.hessian import Hessian
from stabkit.curvature.twin import Twin
from stabkit.curvature.updates import copied, trained_by
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.errors import StabkitError
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.untouched_model import unchanged


@dataclass(frozen=True)
class GivenSteps:
    """What a few steps made of the loss, and the first of them of the weights.

    Attributes:
        left: of the loss, over what it was; infinite where it or a weight ends in what is not finite.
        broken: entries of weights that the first step makes infinite or NaN.
        lost: entries that it leaves what they were, though they have a gradient.
        count: of all entries.
    """

    left: float
    broken: int
    lost: int
    count: int


def steps_of_given(call: ForwardPass, loss: Any, optimizer: torch.optim.Optimizer) -> GivenSteps | None:
    """As many steps as other trainings of the diagnosis take; None where none can be made, or a loss is not positive.

    Model, optimizer and random state stay as they were.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        optimizer: of the parameters of this model.
    """
    with unchanged(call.module):
        try:
            trained = trained_by(optimizer, call.module)
            hessian = Hessian(call.module, trained, Batches(call.inputs, call.kwargs, loss, None), call.seed)
            _, slopes = hessian.slopes()
            before = [p.detach().clone() for p in hessian.parameters]
            twin = Twin(hessian, optimizer)
            first = twin.step()
            after = twin.values()
            broken = sum(int((~value.isfinite()).sum()) for value in after)
            lost = sum(
                int(((now == was) & (slope.to_dense() != 0)).sum())
                for now, was, slope in zip(after, before, slopes, strict=True)
                if slope is not None
            )
            last = twin.losses(STEPS - 1)[-1]
        except (StabkitError, RuntimeError):
            return None
        whole = math.isfinite(last) and all(bool(value.isfinite().all()) for value in twin.values())
    if not first > 0:
        return None
    return GivenSteps(last / first if whole else math.inf, broken, lost, sum(value.numel() for value in before))


def climbs(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether it is set to maximise what it is given."""
    return optimizer is not None and any(group.get("maximize") for group in optimizer.param_groups)


def named_settings(optimizer: torch.optim.Optimizer, name: str) -> list[float]:
    """What its groups hold under a name, each value once; empty where they have no such setting."""
    return sorted({float(g[name]) for g in optimizer.param_groups if isinstance(g.get(name), int | float | Tensor)})


def transferred(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], others: Sequence[Tensor], **settings: float
) -> torch.optim.Optimizer:
    """A copy of an optimizer for other parameters, of another dtype perhaps, and with other settings.

    Args:
        optimizer: it stays as it is.
        parameters: of its own that have a counterpart.
        others: the counterparts.
        settings: what every group that has such a setting is to hold.
    """
    memo: dict[int, Any] = {id(p): other for p, other in zip(parameters, others, strict=True)}
    twin = copied(optimizer, memo)
    for parameter, state in twin.state.items():
        state.update({name: _as_its_parameter(value, parameter) for name, value in state.items()})
    for group in twin.param_groups:
        group.update({name: value for name, value in settings.items() if name in group})
    return twin


def _as_its_parameter(value: Any, parameter: Tensor) -> Any:
    """Moments in the dtype of what they are of; counts of steps stay what they are."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    return value.to(parameter.dtype) if same and parameter.dim() else value
