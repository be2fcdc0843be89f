"""What has no curvature is refused in words, and what only looks so is measured."""

from __future__ import annotations

import math
import random
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit import sharpness
from stabkit.curvature import SharpnessTracker, critical_rate
from stabkit.errors import StabkitError


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(12, 6), torch.arange(12) % 3


def cross_entropy(y):
    return lambda out: functional.cross_entropy(out, y)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": lambda out: None}, "loss returned NoneType; expected a scalar"),
        ({"loss": lambda out: {"loss": out.mean()}}, "loss returned dict .it holds one under 'loss'.; expected"),
        ({"loss": lambda out: types.SimpleNamespace(loss=out.mean())}, "SimpleNamespace .it holds one under 'loss'"),
        ({"loss": lambda out: out.mean() * math.nan}, "the loss is not finite .nan. where the weights are"),
        ({"loss": lambda out: (out * 1e38).square().sum()}, "the loss is not finite .inf. where the weights are"),
        ({"start": [1.0, 2.0]}, "start is a list; expected a tensor"),
        ({"start": torch.zeros(83)}, "start is zero or not finite"),
        ({"start": torch.full((83,), math.nan)}, "start is zero or not finite"),
        ({"blocks": "0"}, "expected a list of paths of modules"),
        ({"seed": "a"}, "seed='a' is a str; expected a whole number"),
        ({"kwargs": [1]}, "kwargs is a list; expected a mapping"),
    ],
)  # fmt: skip
def test_one_batch(change, words):
    model, x, y = made()
    with pytest.raises(StabkitError, match=words):
        sharpness(model, x, **{"loss": cross_entropy(y), **change})


def test_batches_that_are_none():
    model, x, y = made()
    for batches in (x, 3, "xy", {"x": x}):
        with pytest.raises(StabkitError, match="expected pairs of inputs and targets"):
            sharpness(model, loss=functional.cross_entropy, batches=batches)
    with pytest.raises(StabkitError, match="batches holds no samples"):
        sharpness(model, loss=functional.cross_entropy, batches=[(x[:0], y[:0])])
    with pytest.raises(StabkitError, match="that the batch has samples"):
        sharpness(model, x[:0], loss=cross_entropy(y[:0]))


def test_a_batch_without_samples_among_others_is_left_out():
    model, x, y = made()
    with_it = sharpness(model, loss=functional.cross_entropy, batches=[(x[:0], y[:0]), (x[:8], y[:8]), (x[8:], y[8:])])
    without = sharpness(model, x, loss=cross_entropy(y))
    assert with_it.values[0] == pytest.approx(without.values[0], rel=2e-3)
    assert with_it.loss == pytest.approx(without.loss)


def test_a_closure_of_another_model_is_refused():
    model, x, y = made()
    other, *_ = made()
    tracker = SharpnessTracker(model, lambda: cross_entropy(y)(other(x)), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(StabkitError, match="depends on none of the parameters"):
        tracker.measure()


def test_a_rate_that_is_no_number_is_told():
    model, x, y = made()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sgd.param_groups[0]["lr"] = None
    with pytest.raises(StabkitError, match="a setting of the optimizer is a NoneType"):
        sharpness(model, x, loss=cross_entropy(y), optimizer=sgd)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_parameter_without_a_gradient_is_held_fixed(kind):
    ratios = []
    for unused in (False, True):
        model, x, y = made()
        if unused:
            model.register_parameter("unused", nn.Parameter(torch.ones(4)))
        optimizer = kind(model.parameters(), lr=1e-2)
        tracker = SharpnessTracker(model, lambda model=model, x=x, y=y: cross_entropy(y)(model(x)), optimizer)
        for step in range(3):
            optimizer.zero_grad()
            cross_entropy(y)(model(x)).backward()
            if kind is torch.optim.Adam and not step:
                tracker.measure()  # before its first update, by the gradients
            optimizer.step()
        found = sharpness(model, x, loss=cross_entropy(y), optimizer=optimizer, tol=1e-5)
        ratios.append(found.ratio)
        assert any("1 tensors of parameters have had no gradient" in note for note in found.notes) == unused
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_inside_of_autocast_the_model_runs_in_it_and_nothing_else():
    model, x, y = made()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def in_autocast(out):
        assert out.dtype == torch.bfloat16
        return cross_entropy(y)(out)

    plain = sharpness(model, x, loss=cross_entropy(y))
    with torch.autocast("cpu", torch.bfloat16):
        found = sharpness(model, x, loss=in_autocast)
        tracked = SharpnessTracker(model, lambda: in_autocast(model(x)), sgd).measure()
        critical = critical_rate(model, x, loss=in_autocast, optimizer=sgd)
    assert found.converged.all()
    assert found.residuals[0] < 0.05 * found.values[0]
    assert found.values[0] == pytest.approx(plain.values[0], rel=0.02)
    assert tracked.sharpness == pytest.approx(plain.values[0], rel=0.05)
    assert critical.rate == pytest.approx(critical_rate(model, x, loss=cross_entropy(y), optimizer=sgd).rate, rel=0.2)


def test_fused_attention_takes_its_plain_path_and_says_so():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(6, 24), nn.Linear(8, 3)

        def forward(self, x):
            q, k, v = self.mix(x)[None, None].chunk(3, -1)
            return self.out(functional.scaled_dot_product_attention(q, k, v)[0, 0])

    plain, x, y = made()
    (note,) = sharpness(Attends(), x, loss=cross_entropy(y)).notes
    assert note.startswith("attention took its plain path")
    assert sharpness(plain, x, loss=cross_entropy(y)).notes == ()


def test_a_closure_that_draws_masks_is_told_as_one_draw():
    model, x, y = made()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not SharpnessTracker(model, lambda: cross_entropy(y)(model(x)), sgd).measure().draws
    masked = SharpnessTracker(model, lambda: cross_entropy(y)(functional.dropout(model(x))), sgd).measure()
    assert masked.draws
    system = random.SystemRandom()
    new = SharpnessTracker(model, lambda: cross_entropy(y)(model(x + system.random())), sgd)
    with pytest.raises(StabkitError, match="draws no new batches or masks"):
        new.measure()


def test_an_update_that_is_not_finite_is_no_loss_that_is_none():
    """The derivative of a root at zero is infinite, and times zero NaN; the loss itself is finite."""
    model, x, y = made()

    def loss(out):
        return cross_entropy(y)(out) + (out - out.detach()).square().sum(1).sqrt().mean()

    with pytest.raises(StabkitError, match=r"SGD is not finite, though the loss \(1\..*\) is: its gradient is not"):
        critical_rate(model, x, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_update_shorter_than_rounding_is_none_that_raises_the_loss():
    model, x, y = made()
    tiny = critical_rate(model, x, loss=cross_entropy(y), optimizer=torch.optim.Adam(model.parameters(), lr=1e-9))
    assert 1e-4 < tiny.rate < math.inf  # weights round such an update to other lengths, some of them to none
