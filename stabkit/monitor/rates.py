"""Whether the learning rate is stable on the loss, looked at while a model trains and said before the loss shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stabkit.curvature import NotYetError, SharpnessTracker, TrackedSharpness
from stabkit.diagnosis import Finding
from stabkit.errors import ArgumentError, TraceError
from stabkit.monitor.parameters import is_sharded
from stabkit.monitor.record import Look
from stabkit.monitor.rules import AlertRules
from stabkit.monitor.shortening import Shortening

_ROSE = 1.05  # of the rate since the last look, at the edge: time for another
_AGAIN = 0.5  # of the first loss: one that has grown back to that has lost what was learnt
_LEAPT = 1.5  # of the ratio from one look to the next: the next look comes soon
_REFERENCE = "J. Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability, ICLR 2021"


class RateWatch:
    """Measures the sharpness now and then, and judges its ratio to the optimizer's threshold.

    A look comes every so many steps, and sooner where it matters: in the first steps, and while the ratio is beyond the
    edge and has just leapt or the rate has been raised; then again in 1, 2, 4, ... steps.

    Args:
        model: as it is called.
        optimizers: of its parameters; there must be one.
        closure: returns the loss of a fixed batch.
        every: training steps between two looks.
        rules: when it is an alert.
        seed: of what the model draws.
        together: whether other processes take part, whose mean of gradients would be mistaken for clipping.

    Raises:
        ArgumentError: there is not exactly one optimizer, or the parameters are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        closure: Callable[[], Tensor],
        every: int,
        rules: AlertRules | None,
        seed: int,
        *,
        together: bool = False,
    ) -> None:
        if len(optimizers) != 1:
            raise ArgumentError(
                f"closure= measures whether the rate of an optimizer is stable; optimizer= holds {len(optimizers)}, "
                "expected the one that trains the model"
            )
        if is_sharded(model.parameters()):
            raise ArgumentError("closure= needs whole parameters in every process; these are sharded. Leave it out")
        self._optimizer = optimizers[0]
        self._tracker = SharpnessTracker(model, closure, self._optimizer, seed=seed)
        self._every, self._rules = every, rules or AlertRules()
        self._gap, self._last = 1, -1
        self._shortening = None if together else Shortening(model)
        self._before: TrackedSharpness | None = None
        self._first: float | None = None
        self._suspect: float | None = None  # the loss of a look that was beyond the edge with a loss that had grown
        self._losses: list[float] = []
        self.said = False  # that the rate is too high, since it was last below the edge

    def attach(self, step: int) -> None:
        """Be ready for a training step: where a look is due, the gradient is noted as it is made."""
        if self._shortening is not None and self._due(step):
            self._shortening.on()

    def detach(self) -> None:
        """No hook stays behind."""
        if self._shortening is not None:
            self._shortening.off()

    def look(self, step: int, scale: float = 1.0) -> tuple[Look | None, list[Finding]]:
        """A measurement where it is time for one, and what follows from it; call it before the optimizer's step.

        Args:
            step: the training step.
            scale: by what a loss scaler has divided the gradients since they were made.
        """
        shortened = 1.0 if self._shortening is None else self._shortening.factor(scale)
        self.detach()
        found = self._looked(step, shortened)
        self.attach(step + 1)
        return found

    def _due(self, step: int) -> bool:
        return step % self._every == 0 or step >= self._last + self._gap

    def _looked(self, step: int, shortened: float) -> tuple[Look | None, list[Finding]]:
        rose = self._rose()
        if not (rose or self._due(step)):
            return None, []
        try:
            found = self._tracker.measure()
        except NotYetError:  # no gradient of which the first update would be made
            return None, []
        except TraceError:
            if self._before is None:
                raise
            return None, []  # it could be measured before: the loss is not finite any more, which is told elsewhere
        before, self._before, self._last = self._before, found, step
        leapt = before is not None and found.ratio > max(self._rules.edge, _LEAPT * before.ratio)
        self._gap = 1 if rose or leapt else min(2 * self._gap, self._every)
        look = Look(step, found, shortened)
        return look, self._judge(look)

    def _rose(self) -> bool:
        """Whether the rate was raised since the last look, to beyond the edge at the curvature of then."""
        if self._before is None:
            return False
        rates = [g["lr"] for g in self._optimizer.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return False  # to read it would wait for the device
        times = max(float(rate) for rate in rates) / self._before.learning_rate
        return times > _ROSE and times * self._before.ratio > self._rules.edge

    def _judge(self, look: Look) -> list[Finding]:
        found, rules = look.found, self._rules
        self._first = found.loss if self._first is None else self._first
        lowest = min(self._losses, default=found.loss)
        self._losses = [*self._losses[-rules.warmup :], found.loss]
        # of a loss that has become small a few batches make several times as much, at the edge of stability
        grown = found.loss / lowest if lowest > 0 and found.loss > _AGAIN * self._first else 1.0
        if look.ratio < rules.edge:
            self.said = False
        growing = look.ratio > rules.edge and grown > rules.grown
        # a spike that comes down by itself is the edge's own; where the loss is larger still at the next step it is not
        goes_on = growing and self._suspect is not None and found.loss > self._suspect
        self._suspect = found.loss if growing else None
        if growing:
            self._gap = 1
        above = look.ratio > rules.rate or goes_on
        if above and not goes_on and _goes_well(found, rules):
            self._gap = 1
            return []
        if self.said or not above or math.isnan(look.ratio):
            return []
        self.said = True
        return [_finding(look, grown if grown > rules.grown else 1.0)]


def _goes_well(found: TrackedSharpness, rules: AlertRules) -> bool:
    """Whether an update with a young preconditioner was tried and does the loss no great harm.

    Such a preconditioner holds few gradients and is another with the next. Of 336 runs of 8 kinds of networks under
    RMSprop, Adagrad, Adam, NAdam and Adamax the loss never rose by half in 134: the ratio of their first update was up
    to 148 and the loss after it up to 1.39 times that before. In the 68 that it made blow up at once it was 9.3 or
    more; what blows up with a later update (34) is left to the looks that follow. Of 23 runs more that blow up all were
    told before the loss was tenfold, and of 13 that do not 4 fewer were told than with an age of 8 updates.
    """
    return found.loss_after - found.loss < (rules.grown - 1.0) * abs(found.loss)


def _finding(look: Look, grown: float) -> Finding:
    found = look.found
    block = found.block or "the model"
    evidence = (
        f"at training step {look.step} the learning rate of {found.learning_rate:.4g} is {found.ratio:.3g} times the "
        f"largest stable one, {found.largest_stable_lr:.3g}: the curvature of the loss is {found.sharpness:.4g}, most "
        f"of it ({found.share:.0%}) in {block}, and this rate bears {found.threshold:.4g}"
    )
    if look.shortened < 1.0:
        evidence += (
            f"; the gradient is shortened to {look.shortened:.2g} of its length before the step, such as by clipping, "
            f"which leaves {look.ratio:.3g}"
        )
    if found.draws:
        evidence += "; the closure draws random numbers, such as masks of dropout, of which this is one draw"
    if grown > 1.0:
        evidence += f"; the loss has grown by a factor of {grown:.2g}"
    return Finding(
        kind="unstable_update",
        severity="critical",
        steps=(),
        module_path=found.block,
        confidence=0.95,
        evidence=evidence,
        remedy=f"lower the learning rate to {0.8 * found.largest_stable_lr:.2g} or less, or come to it by a warm-up "
        "that is slow enough for the curvature to give way",
        reference=_REFERENCE,
        numbers={
            "training_step": float(look.step),
            "ratio": found.ratio,
            "learning_rate": found.learning_rate,
            "largest_stable_lr": found.largest_stable_lr,
            "sharpness": found.sharpness,
            "threshold": found.threshold,
        },
    )
