"""Whether an update that was just made goes too far for the loss, said before the next loss shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.curvature import SecantCurvature
from stabkit.diagnosis import Finding
from stabkit.diagnosis.losses.signs import is_never_negative
from stabkit.monitor.causes import Cause, Causes
from stabkit.monitor.record import Record
from stabkit.monitor.units import Units

# The fall of the loss that its slope promises along an update, over twice the loss. Of one that is never negative and
# curves evenly along the update at least (1 - that)^2 times as much is left: 4 times at FAR. Measured on 576 runs of 9
# kinds of networks under 8 optimizers at fixed multiples of the largest rate that trains, on which these were chosen:
# of 314 that blow up tenfold 289 are told by this before (125 by all else), a third of them of the very first
# update; of 73 whose loss never rose by half and fell, 6, at half the largest rate or more. On 144 and 92 others, drawn
# by the same rule with another seed, the monitor as a whole told 136 and 2.
FAR, PART = 3.0, 0.5
# Of the norm of the weights. Healthy ones reached 1.06 with a fall beyond PART (LSTM, Adam at 0.5). Where several
# matrices move by more than their own norm they multiply, and no quadratic stands for the loss along the update. In one
# alone, as of a regression or a new head, it is one, and falls up to a part of 2 wherever the weights begin.
MOVES, OTHERS = 0.1, 1.5


class UpdateWatch:
    """Looks at an update between the optimizer's step and the next training step.

    Args:
        optimizer: the one that trains the model.
        secant: what holds weights and gradients before it.
        causes: what is known of rates.
        records: whose newest says how often blocks are called in a training step.
        units: whether the loss that is told is the one that was differentiated.
        tell: takes what there is to say.
        failed: told of an error, which would end the training if it left the hook.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        secant: SecantCurvature,
        causes: Causes,
        records: Sequence[Record],
        units: Units,
        tell: Callable[[Finding, Cause], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._optimizer, self._secant = optimizer, secant
        self._causes, self._records, self._units = causes, records, units
        self._tell, self._failed = tell, failed
        self._undo: Callable[[], None] | None = None
        self._armed: tuple[int, Tensor | float] | None = None

    def arm(self, step: int, loss: Tensor | float | None) -> None:
        """Look at the update that comes.

        Args:
            step: its training step.
            loss: the loss whose gradients were held; it must be known to be never negative.
        """
        if self._units.differ or not isinstance(loss, Tensor) or loss.numel() != 1 or not is_never_negative(loss):
            return
        self._armed = (step, loss.detach())
        self._undo = self._optimizer.register_step_post_hook(self._made).remove

    def disarm(self) -> None:
        """No hook stays behind."""
        self._armed = None
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _made(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        armed, self._armed = self._armed, None  # once: an optimizer may make several updates of one gradient
        if armed is None or torch.compiler.is_compiling():
            return
        try:
            self._judge(armed[0], float(armed[1]))
        except Exception as error:
            self._failed(error)

    def _judge(self, step: int, loss: float) -> None:
        # where the loss is that of one of several micro-batches, or its part in their mean, that of all is no more than
        # so many times as much
        calls = self._records[-1].blocks.calls if self._records else ()
        loss *= min((count for count in calls if count > 0), default=math.nan)
        reach = self._secant.reach()
        rate = self._causes.rates.largest
        if reach is None or not 0.0 < loss < math.inf or math.isnan(rate):
            return
        part = reach.fall / (2.0 * loss)
        moved = reach.update_ratio
        if not ((part > FAR and moved > MOVES) or (part > PART and min(moved, reach.second) > OTHERS)):
            return
        cause = self._causes.of_overshoot(step + 1, part, moved)
        self._tell(_finding(step, loss, part, cause), cause)


def _finding(step: int, loss: float, part: float, cause: Cause) -> Finding:
    left = f", and {(1 - part) ** 2:.2g} times as high after it as before" if part > FAR else ""
    return Finding(
        kind="unstable_update",
        severity="critical" if part > FAR else "warning",
        steps=(),
        module_path="",
        confidence=0.9,
        evidence=f"before training step {step + 1}: {cause.text}; by its slope the loss of {loss:.4g} would fall by "
        f"{2 * part * loss:.3g}, {2 * part:.2g} times what there is: one that curves evenly turns round before{left}",
        remedy=cause.remedy,
        reference="",
        numbers={"training_step": float(step + 1), "loss": loss, "fall": 2 * part * loss, **cause.numbers},
    )
