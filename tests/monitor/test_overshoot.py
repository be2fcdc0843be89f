"""An update that goes too far is told before the next loss shows it, from its own slope and size, without a closure."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from stabkit.monitor import Monitor
from tests.monitor.divergences import Digits, digits
from tests.monitor.runs import ADAM, MOMENTUM, NESTEROV, RMSPROP, SGD, Flat, constant, jump, loss_of

RELU = partial(Flat, nn.ReLU)


class Signs(torch.optim.Optimizer):
    """Steps of one length along every coordinate."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


AT_ONCE = {
    "SGD": (RELU, SGD, constant(20.0)),
    "momentum": (Flat, MOMENTUM, constant(10.0)),
    "Adam": (RELU, ADAM, constant(0.5)),
    "RMSprop": (RELU, RMSPROP, constant(0.05)),
    "Adagrad": (RELU, torch.optim.Adagrad, constant(0.5)),
    "a jump": (Flat, NESTEROV, jump(0.05, 5.0, at=12)),
    "a jump of Adam": (Digits, ADAM, jump(2e-3, 1.0, at=12)),
    "a jump of what has no threshold": (RELU, Signs, jump(1e-3, 1.0, at=12)),
    "a slow climb": (RELU, SGD, lambda step: 0.05 * 1.1**step),
}


def blown_up(build, kind, rate, steps=80):
    """What was told before the loss was ten times its start, and when that was."""
    torch.manual_seed(0)
    model, draw = build(), digits()
    optimizer = kind(model.parameters(), lr=rate(0))
    first = None
    with Monitor(model, 10, optimizer=optimizer) as monitor:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate(step)
            before = list(monitor.findings)
            x, y = draw()
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            first = first or loss.item()
            if not loss.item() <= 10 * first:
                return before, step
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor.findings, None


@pytest.mark.parametrize("name", AT_ONCE)
def test_it_is_told_before_the_loss_is_tenfold(name):
    found, end = blown_up(*AT_ONCE[name])
    assert end is not None
    assert found[0].kind == "unstable_update"
    assert found[0].numbers["training_step"] <= end
    assert found[0].numbers["lower_to"] <= 0.5 * found[0].numbers["learning_rate"]


class Bowl(nn.Module):
    """0.5 c |w|^2, in parts that are divided by their number or not."""

    def __init__(self, curvature=1.0):
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=False).double()
        self.curvature = curvature

    def forward(self, x):
        return self.layer(x)


def bowl(rate, parts=1, shift=0.0):
    """One update of a bowl of curvature 1, whose loss is that of the newest micro-batch."""
    torch.manual_seed(0)
    model = Bowl()
    sgd = SGD(model.parameters(), lr=rate)
    eye = torch.eye(6).double()
    with Monitor(model, 1, optimizer=sgd) as monitor:
        for _ in range(parts):
            loss = 0.5 * model(eye).square().sum() / parts
            loss = loss - shift if shift else loss
            loss.backward()
        monitor.step(loss)
        sgd.step()
    return monitor.findings, loss.item(), 0.5 * model(eye).square().sum().item(), sgd


def test_on_a_quadratic_what_is_left_is_known():
    assert bowl(1.4)[0] == []
    (found,), before, after, _ = bowl(3.2)
    assert after / before == pytest.approx(2.2**2)
    assert f"{2.2**2:.2g} times as high after it" in found.evidence
    assert found.numbers["fall"] == pytest.approx(2 * 3.2 * before, rel=1e-5)


def test_the_loss_of_one_of_several_micro_batches_is_not_taken_for_all():
    assert bowl(1.4, parts=8)[0] == []
    assert len(bowl(3.2, parts=8)[0]) == 1


def test_a_loss_that_may_be_negative_is_not_judged():
    assert bowl(9.0, shift=0.1)[0] == []


def test_no_hook_stays_behind():
    *_, sgd = bowl(1.0)
    assert not sgd._optimizer_step_post_hooks
    assert not sgd._optimizer_step_pre_hooks


def full_batch(step, loss_told, rate, model, x, y, steps=8):
    """The findings of some updates by full batches."""
    optimizer = SGD(model.parameters(), lr=rate)
    with Monitor(model, 10, optimizer=optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            each = (model(x) - y).square()
            step(each).backward()
            monitor.step(loss_told(each))
            optimizer.step()
    return monitor.findings


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_regression_may_move_far_at_part_of_newtons_rate(outputs):
    """Weights that begin at zero have no size to measure a move by, and the loss is a quadratic: at .6 it falls."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(256, 8))[0] * 16.0  # curves alike in all directions: Newton's rate is exact
    model = nn.Linear(8, outputs, bias=False)
    nn.init.zeros_(model.weight)
    y = x @ (10.0 * torch.randn(8, outputs))
    newton = 1.0 / (2.0 / outputs)
    mean = torch.Tensor.mean
    assert full_batch(mean, mean, 0.6 * newton, model, x, y) == []
    nn.init.zeros_(model.weight)
    assert len(full_batch(mean, mean, 3.2 * newton, model, x, y, 1)) == 1  # where it rises it is told as before


UNITS = {
    "the sum, the mean told": (torch.Tensor.sum, torch.Tensor.mean),
    "the sum, a part of it told": (torch.Tensor.sum, lambda each: each.sum() / each.numel()),
    "many times what is told": (lambda each: 500.0 * each.mean(), torch.Tensor.mean),
}


@pytest.mark.parametrize("name", UNITS)
def test_a_loss_of_another_unit_than_the_one_that_was_differentiated_is_not_judged(name):
    differentiated, told = UNITS[name]
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    slow = 0.5 * (64 * 8 / 500.0 if "many" in name else 1.0) / (64 * 8) * 8
    assert full_batch(differentiated, told, slow, model, x, y) == []


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_one_unit_is_judged_whatever_the_unit(reduction, factor):
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    rate = 60.0 * 8 / factor / (1.0 if reduction == "mean" else 64 * 8)
    optimizer = SGD(model.parameters(), lr=rate)
    with Monitor(model, 10, optimizer=optimizer) as monitor:
        loss = factor * nn.functional.mse_loss(model(x), y, reduction=reduction)
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    assert [f.kind for f in monitor.findings] == ["unstable_update"]
