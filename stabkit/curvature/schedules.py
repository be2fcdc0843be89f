"""The learning rates that a schedule has yet to give, found by stepping a copy of it."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stabkit.arguments import accepts
from stabkit.curvature.updates import as_number
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.results import Result

_MOST = 1_000_000  # steps, which take some seconds
_SAME = 1 + 1e-6  # rates that differ by less are one: a cosine by recursion comes back to its start 4e-11 above it


@dataclass(frozen=True)
class RatesAhead(Result):
    """What a schedule does to the learning rate from now on.

    Attributes:
        present: the rate in force, of the group with the largest one.
        largest: the largest rate to come, the present one among them.
        at: in how many steps of the schedule it comes; 0 where it is the present one.
        last: the rate at the end of what was looked at.
        n_steps: how many steps were looked at: fewer than asked for where the schedule ends before.
        failure: the error that ends it, as it will end a training; empty without one.
    """

    present: float
    largest: float
    at: int
    last: float
    n_steps: int
    failure: str = ""

    def beside(self, largest_stable_lr: float) -> str:
        """What the schedule comes to, beside the largest stable rate.

        Example:
            >>> RatesAhead(0.1, 0.3, 40, 0.0, 100).beside(0.15)
            'the schedule climbs to 0.3 in 40 steps, 2 times what is stable now'
        """
        fails = f"; its step {self.n_steps + 1} from now fails with {self.failure}" if self.failure else ""
        if not self.at:
            return f"the rate of {self.present:.3g} is the largest that the schedule has to come{fails}"
        climbs = f"the schedule climbs to {self.largest:.3g} in {self.at} steps"
        if not math.isfinite(largest_stable_lr):
            return f"{climbs}{fails}"
        return f"{climbs}, {self.largest / largest_stable_lr:.2g} times what is stable now{fails}"


@accepts
def rates_ahead(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> RatesAhead:
    """The largest learning rate that a schedule has to come; neither it nor the optimizer is changed.

    A copy of the schedule is stepped, with a copy of the optimizer that holds no parameters. Momentum that is cycled
    beside the rate is not looked at. A schedule that waits for a metric (``ReduceLROnPlateau``) can only lower the
    rate, so that the present one is the largest.

    Args:
        optimizer: whose rates it sets.
        scheduler: one of ``torch.optim.lr_scheduler``, or what steps and copies like one.
        steps: how many of its steps to look ahead, by the unit that it is stepped in (updates or epochs).

    Raises:
        ArgumentError: the schedule is another optimizer's, cannot be copied, or fails in a step.
        ArgumentTypeError: it is no schedule.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.3, total_steps=100)
        >>> found = rates_ahead(sgd, schedule, 100)
        >>> round(found.largest, 3), found.at
        (0.3, 29)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    if not callable(getattr(scheduler, "step", None)) or getattr(scheduler, "optimizer", None) is None:
        raise ArgumentTypeError(f"scheduler is a {type(scheduler).__name__}; expected a torch.optim.lr_scheduler")
    if scheduler.optimizer is not optimizer:
        raise ArgumentError("scheduler sets the rates of another optimizer; give the one that it was made with")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= _MOST:
        raise ArgumentError(f"steps={steps!r}; give a whole number from 0 to {_MOST}")
    present = largest = last = _rate(optimizer)
    at, made, failure = 0, 0, ""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return RatesAhead(present, largest, 0, last, 0)
    twin = _twin(optimizer, scheduler)
    for made in range(1, steps + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the order of steps, which is the user's affair
                twin.step()
        except ValueError:  # it has an end, as OneCycleLR
            made -= 1
            break
        except Exception as error:  # whatever the user's function raises, or torch of settings that it took unseen
            failure = f"{type(error).__name__}: {error}"
            if made == 1:
                raise ArgumentError(
                    f"scheduler {type(scheduler).__name__} fails in its next step: {failure}"
                ) from error
            made -= 1
            break
        last = _rate(twin.optimizer)
        if last > largest * _SAME:
            largest, at = last, made
    return RatesAhead(present, largest, at, last, made, failure)


def end_of(scheduler: Any) -> int | None:
    """In how many steps a schedule comes to the end that it was made for; None where it names none.

    A half cosine that is stepped on climbs again to where it began, which a training of its length never sees.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> end_of(torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=30))
        30
    """
    made, last = 0, scheduler
    if isinstance(scheduler, torch.optim.lr_scheduler.SequentialLR):
        made, last = scheduler._milestones[-1], scheduler._schedulers[-1]
    if not isinstance(last, torch.optim.lr_scheduler.CosineAnnealingLR):
        return None
    left = made + int(last.T_max) - scheduler.last_epoch
    return left if left > 0 else None


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return max(as_number(g["lr"]) for g in optimizer.param_groups)


def _twin(optimizer: torch.optim.Optimizer, scheduler: Any) -> Any:
    """The schedule with an optimizer of empty parameters and no state."""
    held = [p for g in optimizer.param_groups for p in g["params"]]
    stand_ins: dict[int, Any] = {id(p): nn.Parameter(torch.empty(0)) for p in held}
    stand_ins[id(optimizer.state)] = defaultdict(dict)
    try:
        return copy.deepcopy(scheduler, stand_ins)
    except Exception as error:
        raise ArgumentError(
            f"scheduler {type(scheduler).__name__} cannot be copied, so that it cannot be looked ahead of: "
            f"{type(error).__name__}: {error}"
        ) from error
