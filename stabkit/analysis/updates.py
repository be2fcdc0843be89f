"""The coming updates of an optimizer beside the depth of the model: what limits them, and how gradients get there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stabkit.analysis.settings import Settings
from stabkit.curvature import BlockCurvature, Sharpness, rates_ahead
from stabkit.curvature.schedules import end_of
from stabkit.curvature.updates import trained_by
from stabkit.diagnosis import Diagnosis, Measurement, factor
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.suspects import ordered
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.diagnosis.updates.findings import update_findings
from stabkit.diagnosis.updates.measured import UpdateMeasurement, measure_update
from stabkit.diagnosis.updates.scales import with_scales
from stabkit.diagnosis.updates.settings import setting_findings
from stabkit.diagnosis.verdict import nats
from stabkit.distributed import is_spread
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.report import TrainingReport
from stabkit.report.training import BlockShare, Updates
from stabkit.tracing import Flow
from stabkit.tracing.recording.batch_parts import Call
from stabkit.tracing.recording.training_pass import training_pass

_AHEAD = 100_000  # steps of a schedule that are looked at, .3 s; most trainings have fewer
_UNSEEN = "a schedule sets the rate of the optimizer; scheduler= was not given, so that no rate to come is known"
_SPREAD = "the parameters are spread over ranks, of which no curvature is measured"


def check_optimizer(optimizer: Any, scheduler: Any, model: Any, loss: Any) -> None:
    """Say before a long analysis that an optimizer cannot be measured.

    Raises:
        ArgumentError: there is no loss, the optimizer trains other parameters than the model's, or the schedule is
            another optimizer's or fails in a step.
        ArgumentTypeError: it is no torch optimizer, or the model no module.
    """
    if optimizer is None:
        raise ArgumentError(
            f"scheduler={type(scheduler).__name__} and no optimizer; give optimizer= too, whose rates it sets"
        )
    if loss is None:
        raise ArgumentError(
            f"optimizer={type(optimizer).__name__} and no loss: whether updates are stable is a question of the loss "
            "that they lower; give loss= too, a callable on the model's output that returns a scalar, e.g. "
            "loss=lambda out: torch.nn.functional.cross_entropy(out, targets)"
        )
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"optimizer= needs a torch.nn.Module, of whose parameters it is; the model is a {type(model).__name__}"
        )
    if not is_spread(model):
        trained_by(optimizer, model)
    if scheduler is not None:
        rates_ahead(optimizer, scheduler, 1)  # one step says what it makes of its settings


def with_updates(
    diagnosis: Diagnosis, model: nn.Module, flow: Flow, call: Call, settings: Settings
) -> tuple[Diagnosis, TrainingReport]:
    """A diagnosis with what is wrong with the updates, and what was measured of them.

    Args:
        diagnosis: of depth, whose growth says how gradients come to the blocks.
        model: the model.
        flow: the traced pass.
        call: the batch.
        settings: with a loss and an optimizer.
    """
    optimizer = settings.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    if is_spread(model):
        rate = max(float(g["lr"]) for g in optimizer.param_groups)
        found = UpdateMeasurement(type(optimizer).__name__, rate, notes=(_SPREAD,))
    else:
        blocks = _blocks(diagnosis.measurement, model)
        found = measure_update(model, call.inputs, call.kwargs, settings.loss, optimizer, settings.seed, blocks)
    for update in update_findings(found):
        as_trained = replace(flow.forward_pass, through_no_grad=False)
        run = TrainingRun(flow, settings.loss, as_trained, training_pass(as_trained, settings.loss))
        others, told = with_scales(diagnosis.findings, update, found, run, optimizer, settings.seed)
        if told is update and "proposed_rate" not in told.numbers and any(map(serious, others)):
            continue  # updates that no rate cures are those of what is wrong besides
        diagnosis = replace(diagnosis, findings=tuple(ordered([*others, told])))
    if not is_spread(model):
        as_trained = replace(flow.forward_pass, through_no_grad=False)
        run = TrainingRun(flow, settings.loss, as_trained, training_pass(as_trained, settings.loss))
        told_of = setting_findings(run, optimizer)
        diagnosis = replace(diagnosis, findings=tuple(ordered([*told_of, *diagnosis.findings])))
    return diagnosis, _with_schedule(_report(found, diagnosis.measurement), optimizer, settings.scheduler)


def _with_schedule(record: TrainingReport, optimizer: torch.optim.Optimizer, scheduler: Any) -> TrainingReport:
    """With the largest rate to come, or a note that there is one which nobody said."""
    if scheduler is None:
        unseen = (_UNSEEN,) if hasattr(optimizer.step, "_wrapped_by_lr_sched") else ()
        return replace(record, notes=(*record.notes, *unseen))
    ahead = rates_ahead(optimizer, scheduler, end_of(scheduler) or _AHEAD)
    stable = math.inf if record.largest_stable_rate is None else record.largest_stable_rate
    return replace(
        record, largest_rate_ahead=ahead.largest, steps_to_largest_rate=ahead.at, schedule=ahead.beside(stable)
    )


def _blocks(measurement: Measurement, model: nn.Module) -> list[str] | None:
    """The modules of the steps, which the curvature is shared out to."""
    known = {path for path, _ in model.named_modules()}
    paths = {step.module_path: None for step in measurement.steps if step.module_path in known - {""}}
    return list(paths) or None


def _report(found: UpdateMeasurement, measurement: Measurement) -> TrainingReport:
    critical = found.critical
    record = TrainingReport(
        optimizer=found.optimizer,
        learning_rate=found.learning_rate,
        loss=None if critical is None else critical.loss,
        critical_rate=None if critical is None else critical.rate,
        loss_after=None if critical is None else critical.loss_after,
        updates=tuple(
            Updates(rate=run.rate, losses=run.losses)
            for run in (found.present, *(found.lower or (found.proposed,)))
            if run is not None
        ),
        notes=found.notes,
    )
    return record if found.sharpness is None else replace(record, **_of_curvature(found.sharpness, measurement))


def _of_curvature(sharpness: Sharpness, measurement: Measurement) -> Mapping[str, Any]:
    """The fields that a sharpness fills."""
    method = sharpness.method
    assert method is not None
    leading = sharpness.by_block[0]
    step = _step_of(leading.name, measurement)
    behind = None if step is None else _growth_behind(step, measurement)
    return {
        "loss": sharpness.loss,
        "method": method.name,
        "tableau": {name: tuple(map(tuple, np.asarray(getattr(method, name), float).tolist())) for name in "AUBV"},
        "curvature": float(sharpness.values[0]),
        "curvature_residual": float(sharpness.residuals[0]),
        "converged": bool(sharpness.converged[0]),
        "preconditioned": float(sharpness.preconditioned[0]),
        "preconditioned_residual": float(sharpness.preconditioned_residuals[0]),
        "threshold": sharpness.threshold,
        "ratio": sharpness.ratio,
        "largest_stable_rate": sharpness.largest_stable_lr,
        "blocks": tuple(BlockShare(name=b.name, share=b.share, curvature=b.sharpness) for b in sharpness.by_block[:5]),
        "growth_behind": behind,
        "depth": _sentence(leading, step, behind, measurement),
        "n_products": sharpness.n_products,
    }


def _step_of(block: str, measurement: Measurement) -> int | None:
    """The last of the steps that a block is the work of: behind it, the gradient is on its way to the block."""
    paths = [step.module_path for step in measurement.steps]
    own = [i for i, path in enumerate(paths) if path == block]
    around = [i for i, path in enumerate(paths) if path and block.startswith(f"{path}.")]
    within = [i for i, path in enumerate(paths) if block and path.startswith(f"{block}.")]
    return max(own or around or within, default=None)


def _growth_behind(step: int, measurement: Measurement) -> float:
    """The growth of the gradient over all steps behind one, nats."""
    return float(np.asarray(measurement.growth[step + 1 :]).mean(axis=1).sum())


def _sentence(leading: BlockCurvature, step: int | None, behind: float | None, measurement: Measurement) -> str:
    holds = f"{leading.name or 'the model itself'} holds {leading.share:.0%} of the largest curvature"
    if step is None or behind is None:
        return f"{holds}; it is the work of no step, so that no growth over depth leads to it."
    count = len(measurement.steps) - step - 1
    if not count:
        return f"{holds}; it is the last step, and the gradient comes to it from the loss itself."
    if not math.isfinite(behind):
        return f"{holds}; the gradient does not come through the {count} steps behind it ({nats(behind)})."
    change = "grows" if behind >= 0 else "shrinks"
    return (
        f"{holds}; on its way back to it from the output the gradient {change} by a factor of {factor(behind)} "
        f"({nats(behind)}) over the {count} step{'s' * (count > 1)} behind it."
    )
