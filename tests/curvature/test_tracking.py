"""Sharpness followed through a training: near the truth in few products, and none the wiser left behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.curvature import NotYetError, SharpnessTracker, sharpness
from stabkit.curvature.tracking import COLD, EVERY, WARM
from stabkit.errors import ArgumentError, ArgumentTypeError, TraceError


class Bowl(nn.Module):
    """theta, with curvatures that a test moves."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(n, dtype=torch.float64))
        self.register_buffer("curvature", torch.linspace(0.1, 1.0, n, dtype=torch.float64))

    def loss(self):
        return (self.curvature * self.theta.square()).sum() / 2


def digits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)), x, y


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_training_is_followed_by_four_products_to_a_few_percent(kind):
    model, x, y = digits()
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.4),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    }[kind](model.parameters())
    tracker = SharpnessTracker(model, lambda: functional.cross_entropy(model(x), y), optimizer)
    errors, products = [], []
    for step in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 4 == 0 and step >= 20:
            found = tracker.measure()
            truth = sharpness(model, x, loss=lambda out: functional.cross_entropy(out, y), optimizer=optimizer, own=0)
            errors.append(found.sharpness / truth.preconditioned[0] - 1)
            products.append(found.n_products)
            assert found.ratio == pytest.approx(found.sharpness / found.threshold)
            assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    warm = [made for i, made in enumerate(products) if i % EVERY]
    assert max(warm) <= WARM
    assert np.mean(products) <= WARM + (COLD - WARM) / EVERY
    assert np.median(np.abs(errors)) < 0.01
    assert max(np.abs(errors)) < 0.1


def test_a_direction_that_overtakes_is_found():
    """It was second before, which the start holds; what comes out of the blue, the parts that are drawn anew find."""
    model = Bowl(300)
    model.curvature.mul_(0.5)
    model.curvature[0] = 1.0
    tracker = SharpnessTracker(model, model.loss, torch.optim.SGD(model.parameters(), lr=0.1))
    for second in (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15):
        model.curvature[10] = second
        assert tracker.measure().sharpness == pytest.approx(max(second, 1.0), rel=0.05)
    model.curvature[50] = 3.0
    seen = [tracker.measure().sharpness for _ in range(EVERY)]
    assert seen[1] == pytest.approx(3.0, rel=0.01)
    model.curvature[70] = 3.3  # so near to the first that few products do not tell them apart
    seen = [tracker.measure().sharpness for _ in range(EVERY)]
    assert seen[-1] == pytest.approx(3.3, rel=0.01)


def test_what_is_measured_leaves_everything_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4))
    _, x, y = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = SharpnessTracker(model, lambda: functional.cross_entropy(model(x), y), optimizer)
    with pytest.raises(NotYetError, match="has made no update"):
        tracker.measure()  # and there is no gradient of which the first would be made
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    tracker.measure()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), before[1]["state"][key][k]) for k, v in state.items())


def test_a_closure_that_does_not_serve_is_refused():
    model, x, y = digits()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = functional.cross_entropy(model(x), y)
    with pytest.raises(ArgumentTypeError, match="expected a function that returns the loss"):
        SharpnessTracker(model, loss, sgd)
    batches = iter(torch.utils.data.DataLoader(torch.randn(9 * 64, 8), batch_size=64))
    drawing = SharpnessTracker(model, lambda: model(next(batches)).square().mean(), sgd)
    with pytest.raises(ArgumentError, match="draws no new batches"):
        drawing.measure()
    whole = SharpnessTracker(model, lambda: model(x), sgd)
    with pytest.raises(TraceError, match="expected a scalar"):
        whole.measure()

    def whole_step():
        sgd.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    whole_step()
    kept = [p.grad.clone() for p in model.parameters()]
    stepping = SharpnessTracker(model, whole_step, sgd)
    with pytest.raises(TraceError, match="without backward"):
        stepping.measure()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))


def test_convolutions_trained_by_full_batches_hover_at_the_edge_of_stability():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.data[:200] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = nn.functional.one_hot(torch.tensor(data.target[:200]), 10).float()
    first, second = (nn.Conv2d(*channels, 3, stride=2, padding=1) for channels in ((1, 8), (8, 16)))
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def loss():
        return (model(images) - targets).square().sum(1).mean() / 2

    tracker, ratios, losses = SharpnessTracker(model, loss, optimizer), [], []
    for step in range(800):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if step % 50 == 0:
            ratios.append(tracker.measure().ratio)
            losses.append(float(value.detach()))
        optimizer.step()
    assert ratios[0] < 0.85  # it has climbed there
    assert all(abs(ratio - 1) < 0.15 for ratio in ratios[len(ratios) // 2 :])
    assert losses[-1] < 0.3 * losses[0]
