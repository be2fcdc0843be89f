"""Why a loss jumped, gradients exploded or numbers ceased to be finite: what changed in the updates before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from stabkit.curvature import Secant
from stabkit.diagnosis import Finding, factor
from stabkit.monitor.batches import Odd
from stabkit.monitor.learning_rates import LearningRates, Rise

# Of noise alone the ratio of a measurement is 0.5. Single ones say little: of healthy runs one reached 5.4 in
# fine-tuning and one 161 where the data changed, with updates of 5e-4 and 7e-6 of the weights' norm. In 26 kinds held
# out, three draws each, two in a row were both beyond 1 in two, full batches at the edge of stability (1.17 and 1.01)
# and SGD before its rate decays (1.02 and 1.01), and never was one of them beyond EDGE with an update beyond _MOVES.
# The price: a rate that ends a training with ratios between the two is told by the size of the jump alone.
BEYOND, EDGE = 1.0, 1.2
_TWICE = 2  # measurements in a row
_LEAPS = 3.0  # one alone counts where it is beyond that, and the update was long
# Of the norm of the weights, in one update. Healthy ones reached 0.79 in the first ten steps (a line that starts near
# zero; Adagrad 0.72, RMSprop 0.22) and 0.40 later (SGD on a CNN), so that long ones alone want a jump that lasts; no
# ratio of theirs was beyond 1.02, and that of SGD with a rate of 10 began with 1.7.
_LONG, _SHORT, _MOVES = 0.2, 0.1, 0.05
_FEW = 8  # measurements
_LARGE = 10.0  # times the usual size of an update
_NEW = 3.0  # times all rates before: no return to what was borne
_RECENT = 20  # steps within which a rate that is new is to blame for what follows
_KEPT = 50  # measurements
_BELOW = 0.8  # of the largest stable rate


@dataclass(frozen=True)
class Cause:
    """What changed.

    Attributes:
        name: ``rate``, ``update``, ``batch``, or empty for nothing that was seen.
        text: in words, with numbers.
        remedy: what to do.
        numbers: the numbers, by name.
    """

    name: str = ""
    text: str = ""
    remedy: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


class Causes:
    """What is known of the updates so far.

    Args:
        rates: the learning rates.
    """

    def __init__(self, rates: LearningRates) -> None:
        self.rates = rates
        self.measured: deque[tuple[int, Secant]] = deque(maxlen=_KEPT)
        self.odd: Odd | None = None  # the batch that was found unlike the others last

    def add(self, step: int, secant: Secant) -> None:
        """Take note of a measurement along the update before a step."""
        self.measured.append((step, secant))

    @property
    def streak(self) -> Sequence[tuple[int, Secant]]:
        """The newest measurements in a row that are beyond the threshold."""
        found: list[tuple[int, Secant]] = []
        for each in reversed(self.measured):
            if not each[1].ratio > BEYOND:
                break
            found.insert(0, each)
        return found

    def long_since(self, step: int) -> Sequence[tuple[int, Secant]]:
        """The measurements after a step whose update moved the weights far."""
        return [each for each in self.measured if each[0] > step and each[1].update_ratio > _LONG]

    def suspects_rate(self, step: int) -> bool:
        """Whether the rate of the updates before a step is one that was never in force before."""
        rise = self.rates.rise(step, _RECENT)
        return rise is not None and rise.beyond >= _NEW

    def convicts_rate(self, step: int) -> bool:
        """Whether the updates about a step were measured to be too long for the loss, by the rate.

        Beyond the threshold of curvature, or so long that the weights are others: after the rate has risen to one that
        is new, or where most are and one of them was beyond the threshold as well.
        """
        if _is_beyond(self.streak) or any(secant.ratio > EDGE for _, secant in self.mostly_long(step)):
            return True
        rise = self.rates.rise(step, _RECENT)
        new = rise is not None and rise.beyond >= _NEW
        return rise is not None and new and bool(self.long_since(rise.step if rise.sudden else step - _RECENT))

    def mostly_long(self, step: int) -> Sequence[tuple[int, Secant]]:
        """The long updates about a step, where they are several and the rule: batches far out make some among many."""
        long = self.long_since(step - _RECENT)
        newest = list(self.measured)[-_FEW:]
        most = 2 * sum(secant.update_ratio > _LONG for _, secant in newest) >= len(newest)
        return long if len(long) >= _TWICE and most else ()

    def find(self, began: int, step: int) -> Cause:
        """The cause of what began at a step.

        Args:
            began: the step at which it was seen first.
            step: the present step.
        """
        if self.odd is not None and began - 1 <= self.odd.step <= step:
            return _of_batch(self.odd)
        rise = self.rates.rise(began)
        streak = [each for each in self.streak if step - each[0] <= _RECENT]
        beyond = streak if _is_beyond(streak) else []
        long = self.long_since(began - _RECENT)
        new = rise is not None and rise.beyond >= _NEW
        if beyond or new or self.mostly_long(began):
            told = rise if rise is not None and rise.beyond * _CLOSE > 1.0 else None
            return _of_rate(told, beyond, long, self.rates.largest)
        if rise is not None and rise.sudden and rise.beyond * _CLOSE > 1.0:
            return _of_rate(rise, (), long, self.rates.largest)
        return self._of_update(began)

    def of_overshoot(self, step: int, part: float, update_ratio: float) -> Cause:
        """The rate, where the update before a step goes too far.

        Args:
            step: the step after the update.
            part: the fall of the loss that the slope promises along it, over twice the loss.
            update_ratio: the norm of the update over that of the weights.
        """
        rise = self.rates.rise(step)
        told = rise if rise is not None and rise.beyond * _CLOSE > 1.0 else None
        rate = self.rates.largest
        lower = min(rate / part, rate * _SHORT / update_ratio, 0.5 * rate)
        if told is not None:
            lower = max(lower, min(told.low, 0.5 * rate))
        parts = [] if told is None else [str(told)]
        whose = "with it" if parts else f"at the learning rate of {rate:.4g}"
        parts.append(f"{whose} the update has moved the weights by {update_ratio:.2g} of their norm")
        numbers = {"learning_rate": rate, "update_ratio": update_ratio, "lower_to": lower}
        return Cause("rate", "; ".join(parts), _remedy(lower, told), _numbers_of(told) | numbers)

    def with_rise(self, finding: Finding, step: int) -> Finding:
        """A finding with the learning rate's rise before a step, where it is new."""
        rise = self.rates.rise(step)
        if rise is None or not rise.beyond * _CLOSE > 1.0:
            return finding
        evidence, numbers = f"{finding.evidence}; {rise}", {**finding.numbers, **_numbers_of(rise)}
        return replace(finding, evidence=evidence, numbers=numbers)

    def _of_update(self, began: int) -> Cause:
        before = [(at, secant.update_ratio) for at, secant in self.measured]
        past = [size for at, size in before if at < began]
        at, size = before[-1] if before else (-1, math.nan)
        if len(past) < _TWICE or at < began:
            return Cause()
        usual = median(past)
        if size > _LARGE * usual:
            return Cause(
                "update",
                f"the update before training step {at} moved the weights by {size:.2g} of their norm, "
                f"{size / usual:.3g} times as far as usual, at a rate that has not changed",
                "clip the gradient, so that no batch moves the weights that far; look at the batch of the step before",
                {"update_ratio": size, "usual_update_ratio": usual},
            )
        return Cause(
            "batch",
            f"neither the learning rate nor the size of the updates has changed ({size:.2g} of the weights' norm, as "
            f"before), and no update was measured beyond its threshold: what changed is the batch",
            f"look at the batch of training step {began}; clip the gradient, so that no batch moves the weights far",
            {"update_ratio": size, "usual_update_ratio": usual},
        )


def _of_batch(odd: Odd) -> Cause:
    return Cause(
        "batch",
        f"at training step {odd.step} {odd.text}",
        "look at this batch, and at what makes it; leave it out (`if monitor.step(loss).healthy: optimizer.step()`) or "
        "clip the gradient, and go back to a checkpoint before it if its update was made",
        {"odd_batch": float(odd.step)},
    )


_CLOSE = 1.2  # rates that differ by less are the same


def _is_beyond(streak: Sequence[tuple[int, Secant]]) -> bool:
    """Whether measurements beyond the threshold are no noise: two in a row of updates that move the weights, or far."""
    if len(streak) >= _TWICE and any(secant.ratio > EDGE for _, secant in streak):
        return any(secant.update_ratio > _MOVES for _, secant in streak)
    return any(secant.ratio > _LEAPS and secant.update_ratio > _LONG for _, secant in streak)


def _of_rate(
    rise: Rise | None, beyond: Sequence[tuple[int, Secant]], long: Sequence[tuple[int, Secant]], rate: float
) -> Cause:
    parts: list[str] = []
    numbers: dict[str, float] = {}
    measured = beyond or long
    if rise is not None:
        parts.append(str(rise))
        numbers |= _numbers_of(rise)
        rate = rise.high
    elif measured:
        rate = measured[0][1].learning_rate
    if beyond:
        ratios = ", ".join(f"{secant.ratio:.3g}" for _, secant in beyond[:3])
        updates = f"{len(beyond)} updates in a row" if len(beyond) > 1 else "the update"
        parts.append(
            f"the learning rate of {rate:.4g} was beyond its threshold along {updates} before training step "
            f"{beyond[-1][0]}: {ratios} times, by the gradients before and after"
        )
        numbers |= {"ratio": beyond[0][1].ratio, "measured": float(len(beyond))}
        numbers["largest_stable_lr"] = beyond[0][1].largest_stable_lr
    if long:
        updates = f"{len(long)} updates" if len(long) > 1 else "one update"
        sizes = ", ".join(f"{secant.update_ratio:.2g}" for _, secant in long[:3])
        whose = "with it" if parts else f"at the learning rate of {rate:.4g}"
        parts.append(f"{whose} {updates} moved the weights by {sizes} of their norm")
        numbers["update_ratio"] = long[0][1].update_ratio
    floor = 0.0 if rise is None else min(rise.low, 0.5 * rate)
    # by the first that was measured: in the midst of a blow-up the curvature is no longer that of what was learnt
    stable = _BELOW * beyond[0][1].largest_stable_lr if beyond else rate
    short = rate * _SHORT / long[0][1].update_ratio if long else rate
    below = max(min(stable, short, 0.5 * rate), floor)
    numbers |= {"learning_rate": rate, "lower_to": below}
    return Cause("rate", "; ".join(parts), _remedy(below, rise), numbers)


def _numbers_of(rise: Rise | None) -> dict[str, float]:
    if rise is None:
        return {}
    return {"rate_before": rise.low, "rate_after": rise.high, "rate_step": float(rise.step)}


def _remedy(below: float, rise: Rise | None) -> str:
    again = "" if rise is None or not rise.sudden else f" (it was {rise.low:.4g} before)"
    return (
        f"lower the learning rate to below {below:.2g}{again}, warm up to it slowly, or clip the gradient; go back to "
        "a checkpoint before"
    )


def times(value: float, usual: float) -> str:
    """How far a loss is above what is usual, in words."""
    if usual > 0 and value > 0:
        return f"{factor(math.log(value / usual))} times"
    return f"{value - usual:.3g} more than"
