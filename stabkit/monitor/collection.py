"""From device scalars to one record, with one copy to the host."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stabkit.monitor.clipping import Clipped
from stabkit.monitor.measurement import StepNorms
from stabkit.monitor.parameters import Parameters
from stabkit.monitor.record import Array, Blocks, Record
from stabkit.monitor.updates import Updates

WEIGHTS_EVERY = 10  # training steps between two looks at the parameters themselves, which move slowly

# rows of sums by block; those of the batch come first
(
    OUTPUT,
    GRADIENT,
    ENTRIES,
    CALLS,
    SEEN,
    POSITION,
    PRESENT,
    PARAMETER_GRADIENT,
    TRAINED,
    PARAMETER,
    HELD,
    CHANGE,
    AFTER,
) = range(13)
OF_BATCH = slice(0, PRESENT + 1)
_NORMS = [OUTPUT, GRADIENT, PARAMETER, PARAMETER_GRADIENT, CHANGE]  # as a record has them
_JUDGED = [0, 1, 3]  # of these, must be finite
_COUNTED, _COUNTS = slice(0, 4), [CALLS, SEEN, HELD, TRAINED]  # were measured where the count is not zero
# single numbers
LOSS, CLIPPED, SCALE = range(3)


@dataclass
class Sums:
    """One training step of one process: sums over calls and parameters, which add up over processes.

    Attributes:
        step: number of the training step.
        rows: sums by block, squares where they belong to norms; the last column is for parameters outside every block.
        scalars: loss, square of the norm after clipping (NaN without), scale of the loss.
        unscaled: whether the parameter gradients have been divided by that scale already.
        has_loss: whether a loss was given.
        time: when it was seen, in seconds since the epoch.
    """

    step: int
    rows: Array
    scalars: Array
    unscaled: bool = True
    has_loss: bool = False
    time: float = field(default_factory=time.time)


class Collector:
    """Turns what the hooks saw into sums.

    Args:
        parameters: the parameters by block.
        count: number of blocks.
    """

    def __init__(self, parameters: Parameters, count: int) -> None:
        self._parameters = parameters
        self._count = count
        self._weights: Array | None = None
        self._held = np.bincount(parameters.owners, minlength=count + 1)
        self._weights_step = 0

    def weights_due(self, step: int) -> bool:
        """Whether the parameters are looked at in the record of this step."""
        return self._weights is None or step - self._weights_step >= WEIGHTS_EVERY

    def collect(
        self,
        step: int,
        measurement: StepNorms,
        *,
        loss: Tensor | float | None = None,
        scale: Tensor | None = None,
        unscaled: bool = True,
        clipped: Sequence[Clipped] = (),
        updates: Updates | None = None,
    ) -> Sums:
        """The sums of this step, on the host.

        Args:
            step: number of the training step.
            measurement: what the hooks saw.
            loss: the loss.
            scale: the loss scale of AMP.
            unscaled: whether the parameter gradients have been divided by it already.
            clipped: the calls of clipping in this step, whose norms need not be computed again.
            updates: the last update.
        """
        known = {key: value for call in clipped for key, value in call.norms.items()}
        gradients, trained = self._parameters.gradients(known)
        weights = self._parameters.norms() if self.weights_due(step) else []
        changes, after = ([], []) if updates is None else (updates.changes, updates.after)
        given = [x.detach().reshape(-1).sum() for x in (loss, scale) if isinstance(x, Tensor)]
        lists = (measurement.outputs, measurement.gradients, gradients, weights, changes, after)
        outputs, output_gradients, norms, weight_norms, changed, moved, totals, last = _fetch(
            (*lists, [call.total for call in clipped], given)
        )
        norms = self._parameters.wide(norms, trained) if not clipped else norms  # clipping has changed them
        rows = self._of_batch(measurement, outputs, output_gradients)
        if not weights and not np.isfinite(outputs).all():  # is it the weights?
            weights = self._parameters.norms()
            (weight_norms,) = _fetch([weights])
        owners = self._parameters.owners
        owners = owners if len(trained) == len(owners) else owners[trained]
        rows[PARAMETER_GRADIENT] = self._squares(owners, norms)
        rows[TRAINED] = np.bincount(owners, minlength=self._count + 1)
        if weights:
            self._weights, self._weights_step = self._squares(self._parameters.owners, weight_norms), step
        rows[PARAMETER] = self._weights
        rows[HELD] = self._held
        if updates is not None:
            factors = np.array(updates.factors)
            rows[CHANGE] = self._squares(updates.owners, changed * factors)
            rows[AFTER] = self._squares(updates.owners, moved * factors)
        scalars = np.array([math.nan if loss is None or isinstance(loss, Tensor) else float(loss), math.nan, 1.0])
        if isinstance(loss, Tensor):
            scalars[LOSS] = last[0]
        if scale is not None:
            scalars[SCALE] = last[-1]
        if clipped:
            by_id = [(call, call.coefficient(float(total))) for call, total in zip(clipped, totals, strict=True)]
            ratios = {key: ratio for call, ratio in by_id for key in call.norms}
            factors = np.array([ratios.get(id(self._parameters.tensors[i]), 1.0) for i in trained])
            scalars[CLIPPED] = np.square(norms * factors).sum()
        return Sums(step, rows, scalars, unscaled, loss is not None)

    def _of_batch(self, measurement: StepNorms, outputs: Array, gradients: Array) -> Array:
        width = self._count + 1
        rows = np.zeros((AFTER + 1, width))
        rows[OUTPUT] = self._squares(measurement.called, outputs)
        rows[GRADIENT] = self._squares(measurement.reached, gradients)
        rows[ENTRIES] = np.bincount(measurement.called, measurement.entries, width)
        rows[CALLS] = np.bincount(measurement.called, minlength=width)
        rows[SEEN] = np.bincount(measurement.reached, minlength=width)
        for position, index in enumerate(dict.fromkeys(measurement.order)):
            rows[POSITION, index] = position
            rows[PRESENT, index] = 1
        return rows

    def _squares(self, owners: Sequence[int] | Array, norms: Array) -> Array:
        return np.bincount(owners, norms * norms, self._count + 1)


def finish(
    sums: Sums, names: tuple[str, ...], processes: int = 1, before: Blocks | None = None, handed: int = -1
) -> Record:
    """The record of a step.

    Args:
        sums: the sums of all processes together.
        names: the names of the blocks.
        processes: over which the loss is averaged.
        before: the blocks of an earlier record, which lends the columns that are the same.
        handed: the first block whose output is not finite where what it was given is not; negative for none.
    """
    rows, count, held = sums.rows[:, :-1], len(names), names
    scale = float(sums.scalars[SCALE])
    weight_scale = 1.0 if sums.unscaled else scale
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(rows[PRESENT] > 0, rows[POSITION] / rows[PRESENT], math.inf)
        norms = np.sqrt(rows[_NORMS])
        bad = ~np.isfinite(norms[_JUDGED])
        norms[4] /= np.sqrt(rows[AFTER])
    norms[1] /= scale
    norms[3] /= weight_scale
    norms[_COUNTED][rows[_COUNTS] == 0] = math.nan
    calls, entries = rows[CALLS] / processes, rows[ENTRIES]
    if (place[1:] < place[:-1]).any():
        order = np.argsort(place, kind="stable")
        names, norms, calls, entries = tuple(names[i] for i in order), norms[:, order], calls[order], entries[order]
        bad = bad[:, order]
    loss = float(sums.scalars[LOSS])
    broken = sums.has_loss and not math.isfinite(loss)
    squares = sums.rows[PARAMETER_GRADIENT]
    outside = not math.isfinite(squares[count])
    total = math.sqrt(squares.sum()) / weight_scale if sums.rows[TRAINED].any() else math.nan
    weights = np.isfinite(sums.rows[PARAMETER, :-1])
    broken_weights = tuple(name for name, finite in zip(held, weights, strict=True) if not finite)
    blocks = Blocks(names, norms, calls, entries, bad)
    return Record(
        step=sums.step,
        time=sums.time,
        loss=loss,
        gradient_norm=total,
        clipped_norm=math.sqrt(sums.scalars[CLIPPED]) / weight_scale,
        non_finite=int(bad.sum()) + outside + broken,
        blocks=blocks if before is None else blocks.sharing(before),
        loss_is_broken=broken,
        broken_weights=broken_weights,
        handed=held[handed] if handed >= 0 else "",
    )


def _fetch(lists: Sequence[Sequence[Tensor]]) -> list[Array]:
    """Lists of 0-dimensional tensors as float64 on the host, by one copy for all."""
    scalars = [scalar for one in lists for scalar in one]
    if not scalars:
        return [np.zeros(0) for _ in lists]
    try:
        stacked = torch.stack(scalars)
    except RuntimeError:  # on several devices
        device = scalars[0].device
        stacked = torch.stack([scalar.to(device) for scalar in scalars])
    flat = stacked.cpu().numpy().astype(np.float64)
    ends = itertools.accumulate(len(one) for one in lists)
    return [flat[end - len(one) : end] for one, end in zip(lists, ends, strict=True)]
