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
_DOUBLED = 2.0  # of the rate since the last look, wherever it is: time for another, with a trial
_LEAPT = 1.5  # of the ratio from one look to the next: the next look comes soon
_EARLY = 24  # steps whose looks all make a trial: the curvature of a start says little of what comes
_LAST = 4  # losses of a trial that all have to be high: a spike that comes down again is the edge's own
_TENFOLD = 9.0  # of the first loss, above it: what goes there has blown up, whether or not it comes back
_HALVINGS = 10
_REFERENCE = "J. Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability, ICLR 2021"


class RateWatch:
    """Measures the sharpness now and then, and tries updates on copies where its ratio to the threshold is beyond 1.

    A look comes every so many steps, and sooner where it matters: in the first steps, while the ratio is beyond the
    edge and has just leapt, where a trial went far, and where the rate was raised; then again in 1, 2, 4, ... steps.

    The ratio itself is no finding: full batches train at 1, and what learns well went up to 3.1 under SGD, 35 under
    Adam and 69 under RMSprop. What is told is that the last losses of a trial are all beyond `AlertRules.lost` times
    the first of the closure, or one is tenfold. Of 21 healthy runs at .3 to .95 of the largest rate that trains none
    ended a trial beyond 0.86 or was beyond 1.41 in one, and the 19 that blew up by their rate all ended one beyond 1.5
    before (networks of matrices on digits; SGD, momentum, Adam, RMSprop), on which the number was chosen.

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
        self.said = False  # that the rate is too high, since a trial or the ratio last said that it is not

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
        times = self._times()
        rose = self._before is not None and times > _ROSE and times * self._before.ratio > self._rules.edge
        if not (rose or times > _DOUBLED or self._due(step)):
            return None, []
        longest = _norm(self._optimizer) if shortened < 1.0 else math.inf
        tried_from = -math.inf if step < _EARLY or times > _DOUBLED else self._rules.edge
        try:
            found = self._tracker.measure(tried_from=tried_from, longest=longest)
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
        return look, self._judge(look, longest)

    def _times(self) -> float:
        """By how much the rate was raised since the last look; 1 where that is not known."""
        rates = [g["lr"] for g in self._optimizer.param_groups]
        if self._before is None or any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return 1.0  # to read it would wait for the device
        return max(float(rate) for rate in rates) / self._before.learning_rate

    def _judge(self, look: Look, longest: float) -> list[Finding]:
        found = look.found
        self._first = found.loss if self._first is None else self._first
        limit = self._first + (self._rules.lost - 1.0) * abs(self._first)
        end = _end(found.trial)
        if not (end > limit or max(found.trial, default=-math.inf) > self._first + _TENFOLD * abs(self._first)):
            self.said = self.said and not (found.trial or look.ratio < self._rules.edge)
            if max(found.trial, default=limit) > limit:
                self._gap = 1
            return []
        if self.said:
            return []
        self.said = True
        return [_finding(look, self._first, end, self._lower(found, longest))]

    def _lower(self, found: TrackedSharpness, longest: float) -> float:
        """A lower rate, with which a trial does not raise the loss; 0 where none is found."""
        factor = min(0.5, 0.8 / found.ratio) if found.ratio > 0.0 else 0.5
        for _ in range(_HALVINGS):
            if _end(self._tracker.tried(factor, longest)) <= found.loss:
                return factor * found.learning_rate
            factor /= 2.0
        return 0.0


def _norm(optimizer: torch.optim.Optimizer) -> float:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads]))


def _end(trial: Sequence[float]) -> float:
    """The least of the last losses; infinite where one is not finite, and minus that where none were tried."""
    if not all(map(math.isfinite, trial)):
        return math.inf
    return min(trial[-_LAST:], default=-math.inf)


def _finding(look: Look, first: float, end: float, lower: float) -> Finding:
    found = look.found
    block = found.block or "the model"
    left = f"at {end:.4g} or more" if math.isfinite(end) else "not finite"
    if max(found.trial) > 2.0 * end:
        left += f" and take it to {max(found.trial):.4g} on the way"
    evidence = (
        f"at training step {look.step} the learning rate of {found.learning_rate:.4g} raises the loss of the closure: "
        f"{len(found.trial) - 1} updates, tried on copies, leave it {left}, from {found.loss:.4g} now and {first:.4g} "
        f"at first; the rate is {found.ratio:.3g} times the largest stable one, {found.largest_stable_lr:.3g}, where "
        f"the weights are: the curvature of the loss is {found.sharpness:.4g}, most of it ({found.share:.0%}) in "
        f"{block}, and this rate bears {found.threshold:.4g}"
    )
    if look.shortened < 1.0:
        evidence += (
            f"; the gradient is shortened to {look.shortened:.2g} of its length before the step, such as by clipping, "
            f"which leaves {look.ratio:.3g}, and those of the trial are clipped to the same norm"
        )
    if found.draws:
        evidence += "; the closure draws random numbers, such as masks of dropout, of which this is one draw"
    lowered = "go back to an earlier checkpoint: no rate that was tried keeps the loss where it is"
    if lower:
        lowered = f"lower the learning rate to {lower:.2g}, with which the same trial does not raise the loss"
    return Finding(
        kind="unstable_update",
        severity="critical",
        steps=(),
        module_path=found.block,
        confidence=0.95,
        evidence=evidence,
        remedy=f"{lowered}, or come to the rate by a warm-up that is slow enough for the curvature to give way",
        reference=_REFERENCE,
        numbers={
            "training_step": float(look.step),
            "ratio": found.ratio,
            "learning_rate": found.learning_rate,
            "largest_stable_lr": found.largest_stable_lr,
            "lower_to": lower,
            "sharpness": found.sharpness,
            "threshold": found.threshold,
            "loss": found.loss,
            **({"loss_after": end} if math.isfinite(end) else {}),
        },
    )
