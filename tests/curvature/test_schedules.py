"""The rates that a schedule has yet to give, beside what stepping the schedule itself gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from stabkit.curvature import rates_ahead
from stabkit.curvature.schedules import end_of
from stabkit.errors import ArgumentError, ArgumentTypeError

SCHEDULES = {
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, 20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.9, 0.2], total_steps=40),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 + 0.1 * (t % 7)),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=6),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 10), lr_scheduler.CosineAnnealingLR(o, 20)], [10]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8),
}  # fmt: skip


def made(name):
    groups = [
        {"params": [nn.Parameter(torch.ones(3))], "lr": 0.3},
        {"params": [nn.Parameter(torch.ones(2))], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    return optimizer, SCHEDULES[name](optimizer)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("begun", [0, 5])
@pytest.mark.filterwarnings("ignore")
def test_it_is_what_stepping_gives_and_nothing_moves(name, begun):
    optimizer, schedule = made(name)
    for _ in range(begun):
        optimizer.step()
        schedule.step()
    before = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    found = rates_ahead(optimizer, schedule, 30)
    after = optimizer.state_dict(), schedule.state_dict()
    assert str(after) == str(before)
    rates = [max(g["lr"] for g in optimizer.param_groups)]
    for _ in range(30):
        optimizer.step()
        schedule.step()
        rates.append(max(g["lr"] for g in optimizer.param_groups))
    assert (found.present, found.largest, found.last) == (rates[0], max(rates), rates[-1])
    assert found.at == rates.index(max(rates))
    assert found.n_steps == 30


def test_a_schedule_that_ends_is_looked_at_to_its_end():
    optimizer, schedule = made("one cycle")
    found = rates_ahead(optimizer, schedule, 1000)
    assert found.n_steps < 45
    assert found.largest == pytest.approx(0.9)
    assert found.beside(0.45).endswith("steps, 2 times what is stable now")


def test_what_waits_for_a_metric_can_only_fall():
    optimizer, _ = made("lambda")
    rate = max(g["lr"] for g in optimizer.param_groups)
    found = rates_ahead(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer), 10)
    assert (found.largest, found.at) == (rate, 0)


def test_others_are_refused():
    optimizer, schedule = made("cosine")
    with pytest.raises(ArgumentError, match="another optimizer"):
        rates_ahead(made("cosine")[0], schedule, 3)
    with pytest.raises(ArgumentTypeError, match="scheduler is a float"):
        rates_ahead(optimizer, 0.1, 3)
    with pytest.raises(ArgumentError, match="steps=-1"):
        rates_ahead(optimizer, schedule, -1)


def test_a_schedule_that_fails_is_told_with_its_step():
    optimizer, _ = made("cosine")
    factors = [1.0, 2.0]
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: factors[t])
    found = rates_ahead(optimizer, schedule, 3)
    assert (found.n_steps, found.at) == (1, 1)
    assert found.beside(0.3).endswith("now; its step 2 from now fails with IndexError: list index out of range")
    factors.pop()
    with pytest.raises(ArgumentError, match="scheduler LambdaLR fails in its next step: IndexError"):
        rates_ahead(optimizer, schedule, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_half_cosine_ends_where_it_was_made_to():
    optimizer, schedule = made("cosine")
    found = rates_ahead(optimizer, schedule, 100_000)  # it comes back 1666 times, each a little higher
    assert (found.at, found.largest) == (0, found.present)
    optimizer, schedule = made("sequence")
    assert end_of(schedule) == 30
    for _ in range(15):
        schedule.step()
    assert end_of(schedule) == 15
    assert rates_ahead(optimizer, schedule, 15).at == 0  # it would climb again in the 16th
    assert end_of(made("restarts")[1]) is None
