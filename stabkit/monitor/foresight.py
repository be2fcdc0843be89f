"""What is watched at every training step beside the records: the loss, the rate, the curvature along updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.curvature import NoThresholdError, NotYetError, PendingSecant, SecantCurvature
from stabkit.diagnosis import Finding
from stabkit.diagnosis.finding import of_training
from stabkit.errors import ArgumentError
from stabkit.monitor.batches import Batches, Odd
from stabkit.monitor.causes import Cause, Causes, times
from stabkit.monitor.learning_rates import LearningRates
from stabkit.monitor.losses import FAR, FEW, MILD, SLIGHT, Jump, LossJumps, LossReader
from stabkit.monitor.overshoot import UpdateWatch
from stabkit.monitor.parameters import is_sharded
from stabkit.monitor.rates import RateWatch
from stabkit.monitor.record import Along, Record
from stabkit.monitor.rules import AlertRules
from stabkit.monitor.units import Units

_FIRST = 8  # steps that are all measured
_EVERY = 100  # steps between two measurements where nothing happens: what starts one are a loss or a rate that rises
_AFTER = 10  # steps that are measured after the rate rose beyond all before
_MORE = 4  # measured in a row after one that is beyond the threshold, at most; then it is the edge of stability


class Foresight:
    """Sees a loss that jumps at its own step, whatever is recorded, and says what changed before.

    Args:
        model: as it is trained.
        optimizers: of its parameters; the curvature is measured where there is one, with whole parameters.
        rules: of the monitor.
        batches: what goes into the model.
        records: of the monitor.
        watch: of the sharpness; what it has said is not said again.
        tell: takes what there is to say after the optimizer's step.
        failed: told of an error then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rules: AlertRules | None,
        batches: Batches,
        records: Sequence[Record],
        watch: RateWatch | None,
        tell: Callable[[list[Finding]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        rules = rules or AlertRules()
        self._batches = batches
        self._optimizers = list(optimizers)
        self.rates = LearningRates(optimizers)
        self.causes = Causes(self.rates)
        self._reader, self._jumps = LossReader(), LossJumps(rules)
        self._secant, self.unmeasured = _secant(model, self._optimizers)
        self._ahead: UpdateWatch | None = None
        self._units = Units(batches.model)
        if self._secant is not None:
            seen = (self.causes, records, self._units)
            self._ahead = UpdateWatch(self._optimizers[0], self._secant, *seen, self._tell, failed)
        self._watch, self._found_ahead = watch, tell
        self._pending: tuple[int, PendingSecant] | None = None
        self._next, self._extra = 0, 0
        self._quiet, self._warmup = rules.warmup, rules.warmup
        self._newest: Along | None = None
        self._clipped: Any = None  # the point of this step, taken before its gradients were clipped
        self._last: Any = None  # the point of this step
        self._began: int | None = None  # of the newest episode
        self._high = self._jumping = False  # the newest loss is above those before; and is about to be told
        self.broken = False  # the loss is not finite any more
        self.told_broken = False  # which was told between two records
        self.cause: Cause | None = None  # of what was told last
        self.loss = math.nan  # the newest that was read

    def attach(self, step: int) -> None:
        """Begin to watch what goes into the model, at a step."""
        self._batches.on(step)
        if self._ahead is not None:
            self._units.on()

    def detach(self) -> None:
        """Stop watching; no hook stays behind."""
        self._batches.off()
        self._units.off()
        self._disarm()

    def blamed(self, step: int) -> Odd | None:
        """The batch that is to blame for what is told at a step, where one was found unlike the others lately."""
        odd = self.causes.odd
        return odd if odd is not None and step - odd.step <= self._warmup else None

    @property
    def suspicious(self) -> bool:
        """Whether every step is to be recorded: the loss has jumped, or seems to."""
        return self._jumping or self._quiet < self._warmup

    @property
    def calm(self) -> bool:
        """Whether the newest loss is finite and nothing seems to be wrong with it."""
        return not (self.suspicious or self.broken)

    def odd(self, step: int) -> Odd | None:
        """The odd batch of this process that is to blame at a step."""
        self._look_at_batch(step)
        return self.blamed(step)

    def _heard(self, odds: Sequence[Odd | None], told: Sequence[Finding]) -> list[Finding]:
        """Learn of the odd batches of all processes; what there is to say of one that no finding will name."""
        number = next((i for i, odd in enumerate(odds) if odd is not None), 0)
        odd = odds[number]
        if odd is None or number == 0 or (self.causes.odd is not None and self.causes.odd.step == odd.step):
            return []
        self.causes.odd = replace(odd, text=f"in process {number} {odd.text}")
        if told or self._quiet >= self._warmup:
            return []
        self.cause = self.causes.find(odd.step + 1, odd.step + 1)
        kind = "non_finite" if self.broken else "exploding"
        numbers = {"training_step": float(odd.step), **self.cause.numbers}
        return [of_training(kind, "critical", self.cause.text, self.cause.remedy, "", numbers)]

    def take(self) -> Along | None:
        """The newest measurement since the last call."""
        newest, self._newest = self._newest, None
        return newest

    def before_clipping(self, scale: Tensor | float) -> None:
        """Keep the gradients of this step before they are clipped."""
        if self._secant is not None and self._secant.holds:
            self._clipped = self._secant.point(scale)

    def look(
        self, step: int, loss: Tensor | float | None, scale: Tensor | float, recorded: bool, scaled: Tensor | None
    ) -> list[Finding]:
        """What there is to say at a step; call it between ``backward`` and the optimizer's step.

        Args:
            step: the training step.
            loss: its loss.
            scale: what the gradients are multiplied by.
            recorded: whether the step is recorded, so that a loss that is not finite is told elsewhere.
            scaled: what the loss was multiplied by before ``backward``; None for nothing.
        """
        self._disarm()
        self._units.see(loss, 1.0 if scaled is None else scaled)
        self._measure(step, scale)
        found = []
        for at, value in self._reader.take(step, loss):
            found += self._judge(at, step, value, recorded)
        self.rates.see(step)
        self._prepare(step, scale)
        if self._ahead is not None and self._secant is not None and self._secant.holds and not self.suspicious:
            self._ahead.arm(step, loss)
        return found

    def done(self, step: int, loss: Tensor | float | None, *, seen: bool) -> None:
        """Let go of what only this step could ask for.

        Args:
            step: the training step.
            loss: its loss; one on a device will be judged in the next step, together with its batch.
            seen: whether it was recorded, and nothing was found.
        """
        if self.calm and (seen or step < _FIRST):
            self._batches.see()
        self._batches.passed(step + 1, late=isinstance(loss, Tensor) and loss.device.type != "cpu")

    def _disarm(self) -> None:
        if self._ahead is not None:
            self._ahead.disarm()

    def _tell(self, finding: Finding, cause: Cause) -> None:
        if self._watch is None or not self._watch.said:
            self._quiet, self.cause, self._began = 0, cause, int(finding.numbers["training_step"])
            self._found_ahead([finding])

    def explained(
        self, findings: Sequence[Finding], odds: Sequence[Odd | None], began: int, step: int
    ) -> list[Finding]:
        """Findings with what changed before, where a rate or an update did; a loss that is not finite is said once.

        It is said again where nothing had changed and a record now names the block.

        Args:
            findings: of a record.
            odds: the odd batches of all processes, this one's first; None where there is none.
            began: the step at which something moved first, by the records.
            step: the present step.
        """
        unplaced = self.cause is None or not self.cause.name  # which block it is was not to be seen between records
        known = [f.kind == "non_finite" and self.told_broken and not (unplaced and f.module_path) for f in findings]
        news = [finding for finding, old in zip(findings, known, strict=True) if not old]
        return [*self._heard(odds, news), *(self._explained(finding, began, step) for finding in news)]

    def _explained(self, finding: Finding, began: int, step: int) -> Finding:
        if finding.kind not in ("exploding", "non_finite"):
            return finding
        self._look_at_batch(step)
        if self.suspicious and self._began is not None:
            began = min(began, self._began)
        cause = self.causes.find(began, step)
        of_all = cause.name == "batch" and finding.kind == "exploding" and not finding.module_path
        of_all = of_all or "odd_batch" in cause.numbers
        if not (of_all or cause.name in ("rate", "update")):
            return finding
        self.cause = cause
        numbers = {**finding.numbers, **cause.numbers}
        return replace(finding, evidence=f"{finding.evidence}; {cause.text}", remedy=cause.remedy, numbers=numbers)

    def first_sign(self, step: int) -> int:
        """The first step whose weights may have been harmed already: that of the loss, or the one after the rate rose.

        Args:
            step: the step at which something moved first, by the records.
        """
        if self.suspicious and self._began is not None:
            step = min(step, self._began)
        by_rate = self.cause is not None and self.cause.name == "rate" and 0 <= self.rates.risen < step
        return self.rates.risen + 1 if by_rate else step

    def known(self) -> dict[str, Any]:
        """What a capsule keeps: the optimizer, its rates, the last measurements and the cause that was told."""
        return {
            "optimizers": [
                {
                    "class": type(one).__name__,
                    "groups": [
                        {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if _is_setting(k, v)}
                        for group in one.param_groups
                    ],
                }
                for one in self._optimizers
            ],
            "curvature_along_updates": [
                {"step": at, **{k: _plain(v) for k, v in vars(secant).items()}} for at, secant in self.causes.measured
            ][-_AFTER:],
        }

    def _judge(self, at: int, step: int, value: float, recorded: bool) -> list[Finding]:
        self.loss = value
        if value - value != 0.0:  # NaN or infinite
            if self.broken or (recorded and at == step):
                self.broken = True
                return []
            self.broken = self.told_broken = True
            self._quiet = 0
            self._look_at_batch(at)
            self.cause = self.causes.find(at, step)
            return [_non_finite(at, value, self.cause)]
        self.broken = self.told_broken = False
        jump = self._jumps.add(at, value)
        self._quiet += 1
        self._high = jump is not None
        self._jumping = jump is not None and jump.lasting > MILD
        if jump is None:
            return []
        if jump.excess > FAR:
            self._look_at_batch(at)
        if self._quiet <= self._warmup:
            self._quiet = 0
            return []
        self._began = jump.began
        if not self._is_told(jump):
            return []
        self._quiet = 0
        self.cause = self.causes.find(jump.began, step)
        return [_jumped(jump, self.cause)]

    def _look_at_batch(self, step: int) -> None:
        """Ask once whether the batch of a step is unlike the others."""
        if self.causes.odd is None or self.causes.odd.step != step:
            self.causes.odd = self._batches.odd(step) or self.causes.odd

    def _is_told(self, jump: Jump) -> bool:
        """Whether a jump is more than batches do: by its size, or smaller ones where the rate is to blame."""
        odd = self.causes.odd is not None and self.causes.odd.step == jump.step
        if jump.sure or odd:
            return True
        if self.causes.convicts_rate(jump.began):
            return jump.excess > MILD or jump.lasting > SLIGHT or jump.lost > 1
        if self.causes.suspects_rate(jump.began) and (jump.excess > FAR or jump.lasting > MILD):
            return True
        # Weights that start small are soon others in good training too: two kinds of 26 had losses by 0.1 to 0.85 above
        # all before while their updates were long, and one loss or two say little of what is usual.
        return jump.lasting > (FAR if jump.seen < FEW else MILD) and bool(self.causes.mostly_long(jump.began))

    def _measure(self, step: int, scale: Tensor | float) -> None:
        self._fetch(wait=False)
        if self._secant is None or not self._secant.holds:
            return
        point = self._clipped or self._secant.point(scale)
        self._clipped = pending = None
        try:
            pending = None if self.unmeasured else self._secant.between(point)
        except NotYetError:  # no update was made, as a loss scaler skips one
            pass
        except (NoThresholdError, ArgumentError) as error:
            self.unmeasured = str(error)  # how far an update goes is seen all the same
        self._secant.hold(None)
        self._last = point
        if pending is not None:
            self._pending = (step, pending)
            self._fetch(wait=pending.numbers.device.type == "cpu")

    def _fetch(self, wait: bool) -> None:
        """Read what was measured: at once on a CPU, one step late on a device, whose work is done by then."""
        if self._pending is None:
            return
        step, read = self._pending
        if not wait and read.numbers.device.type == "cpu":
            return
        self._pending = None
        secant = read()
        if secant is None:
            return
        self.causes.add(step, secant)
        self._newest = Along(step, secant)
        self._extra = self._extra + 1 if secant.ratio > 1.0 else 0

    def _prepare(self, step: int, scale: Tensor | float) -> None:
        """Keep weights and gradients where the update that comes is to be measured."""
        last, self._last = self._last, None
        if self._secant is None:
            return
        risen = self.rates.risen >= 0 and step - self.rates.risen < _AFTER
        due = step < _FIRST or step % _EVERY == _EVERY - 1
        if due or risen or self._high or self.suspicious or 0 < self._extra <= _MORE:
            self._secant.hold(last or self._secant.point(scale))


def _secant(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[SecantCurvature | None, str]:
    if len(optimizers) != 1:
        return None, f"{len(optimizers)} optimizers"
    if is_sharded(model.parameters()) or any(p.is_complex() for p in model.parameters()):
        return None, "parameters that are sharded or complex"
    try:
        return SecantCurvature(model, optimizers[0]), ""
    except ArgumentError as error:  # of other parameters too, or of none that are trained
        return None, str(error)


def _is_setting(name: str, value: Any) -> bool:
    if name == "params":
        return False
    return isinstance(value, bool | int | float | str | tuple) or (
        isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
    )


def _plain(value: float) -> float | str:
    return value if value - value == 0.0 else str(value)


def _non_finite(step: int, value: float, cause: Cause) -> Finding:
    text = f"; {cause.text}" if cause.text else ""
    return of_training(
        kind="non_finite",
        severity="critical",
        evidence=f"at training step {step} the loss is {value}{text}",
        remedy=cause.remedy or "lower the learning rate or clip the gradient, and analyse the capsule",
        reference="",
        numbers={"training_step": float(step), **cause.numbers},
    )


def _jumped(jump: Jump, cause: Cause) -> Finding:
    of_rate = cause.name == "rate"
    since = "" if jump.began == jump.step else f", since step {jump.began}"
    text = f"; {cause.text}" if cause.text else ""
    return Finding(
        kind="unstable_update" if of_rate else "exploding",
        severity="critical" if of_rate and jump.excess > MILD else "warning",
        steps=(),
        module_path="",
        confidence=0.95 if of_rate else 0.8,
        evidence=f"at training step {jump.step} the loss is {jump.value:.4g}, {times(jump.value, jump.usual)} the "
        f"usual {jump.usual:.4g}{since}; the highest before was {jump.highest:.4g}{text}",
        remedy=cause.remedy or "look at the batch of this step, clip the gradient, or lower the learning rate",
        reference="",
        numbers={
            "training_step": float(jump.step),
            "began": float(jump.began),
            "loss": jump.value,
            "usual": jump.usual,
            **cause.numbers,
        },
    )
