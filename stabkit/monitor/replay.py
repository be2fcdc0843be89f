"""A capsule run again: the record that its step gives now, beside the one that was written then."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stabkit.checkpoints.capsule_loading import build, outer_gradients, output_tensors, remembered, set_buffers
from stabkit.checkpoints.capsules import Capsule, read_capsule
from stabkit.checkpoints.model_names import Model
from stabkit.errors import CheckpointError
from stabkit.monitor.collection import Collector, finish
from stabkit.monitor.measurement import Hooks, StepNorms
from stabkit.monitor.parameters import Parameters
from stabkit.monitor.record import Record
from stabkit.results import Result
from stabkit.tracing.recording.randomness import unchanged_randomness

COMPARED = ("activation_norm", "gradient_norm", "parameter_gradient_norm")


@dataclass(frozen=True)
class Replay(Result):
    """A step run again.

    Attributes:
        capsule: what was run.
        record: what it gives now; no loss, and update ratios are not measured.
        differences: the largest relative difference from the written record over the blocks, by quantity; NaN where
            neither has a number, 0 where both are not finite in the same blocks, infinite where only one is.
    """

    capsule: Capsule
    record: Record
    differences: Mapping[str, float] = field(default_factory=dict)

    def agrees(self, tolerance: float = 1e-5) -> bool:
        """Whether every quantity that was recorded came out the same, within a relative tolerance."""
        found = [value for value in self.differences.values() if not math.isnan(value)]
        return bool(found) and max(found) <= tolerance

    def _contents(self) -> dict[str, Any]:
        capsule = {"capsule": str(self.capsule.path), "step": self.capsule.step}
        return {**capsule, "record": self.record, "differences": self.differences}


def replay(
    path: str | os.PathLike[str], model: Model | None = None, *, factory_args: Mapping[str, Any] | None = None
) -> Replay:
    """The record that the step of a capsule gives now, and how far it is from the one written then.

    Forward and backward passes of all calls run again with the weights, the batches, the random states and the
    gradients at the output of that step. On the same machine with the same libraries the numbers are the same to
    rounding; the random generators are left as they were.

    Args:
        path: the capsule's directory.
        model: the architecture: a name, a module (whose weights and gradients are replaced) or a callable; None takes
            what the monitor was told, if that is a library's.
        factory_args: keyword arguments of the factory.

    Raises:
        CheckpointError: it is no readable capsule, does not fit the model, or holds only a part of the step.
    """
    capsule = read_capsule(path)
    if not capsule.complete or not capsule.calls:
        raise CheckpointError(
            f"{capsule.path} holds {len(capsule.calls)} calls of the model, which are not the whole step"
        )
    module, _ = build(capsule, model, factory_args=factory_args)
    blocks = capsule.record["blocks"]
    names = tuple(block["name"] for block in blocks)
    hooks = Hooks({i: module.get_submodule(name) for i, name in enumerate(names)}, _raise)
    module.zero_grad(set_to_none=True)
    measurement = hooks.on()
    try:
        with unchanged_randomness():
            _run(module, capsule, measurement)
        sums = Collector(Parameters(module, names), len(names)).collect(capsule.step, measurement)
    finally:
        hooks.off()
    record = finish(sums, names, capsule.processes)
    now = [{**vars(block)} for block in record.blocks]
    found = {block["name"]: block for block in now}
    return Replay(capsule, record, {q: _difference(blocks, found, q) for q in COMPARED})


def _run(module: nn.Module, capsule: Capsule, measurement: StepNorms) -> None:
    for call in capsule.calls:
        set_buffers(module, call)
        undo = remembered(module, call, capsule.autocast)
        try:
            with torch.enable_grad():
                output = module(*call.args, **call.kwargs)
        finally:
            undo()
        seen = len(measurement.gradients)
        gradients = outer_gradients(output, call, capsule.scale * capsule.processes)
        del measurement.gradients[seen:], measurement.reached[seen:]  # of the passes that took the outputs apart
        tensors = output_tensors(output)
        torch.autograd.backward([tensors[n] for n in gradients], list(gradients.values()))


def _difference(then: Any, now: Mapping[str, Mapping[str, Any]], quantity: str) -> float:
    worst = math.nan
    for block in then:
        a, b = float(block[quantity]), float(now[block["name"]][quantity])
        if math.isnan(a) and math.isnan(b) and not block["non_finite"]:
            continue
        same = a == b or (not math.isfinite(a) and not math.isfinite(b))
        difference = 0.0 if same else abs(a - b) / max(abs(a), abs(b))
        difference = math.inf if math.isnan(difference) else difference
        worst = difference if math.isnan(worst) else max(worst, difference)
    return worst


def _raise(error: Exception) -> None:
    raise error
