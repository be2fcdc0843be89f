"""The curvature along an update, against that of quadratics whose threshold is known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from stabkit.curvature import NotYetError, SecantCurvature
from stabkit.curvature.stability import Stability
from stabkit.curvature.updates import adam, read_update
from stabkit.errors import ArgumentError

SGD = torch.optim.SGD


def run(optimizer, steps, curvature=3.0, weights=4096):
    """Measurements on a quadratic that curves alike in all directions, of more entries than are sampled."""
    torch.manual_seed(0)
    model = nn.Linear(weights, 1, bias=False).double()
    opt = optimizer(model.parameters())
    secant = SecantCurvature(model, opt)
    found = []
    for step in range(steps):
        opt.zero_grad()
        (0.5 * curvature * model.weight.square().sum()).backward()
        if step:
            found.append(secant.between(secant.point())())
        secant.hold(secant.point())
        opt.step()
    return found


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (partial(SGD, lr=0.5), 4.0),
        (partial(SGD, lr=0.5, momentum=0.9), 7.6),
        (partial(SGD, lr=0.5, momentum=0.9, nesterov=True), 7.6 / 2.8),
        (partial(SGD, lr=0.5, weight_decay=0.1), 3.9),
    ],
)
def test_a_quadratic_has_its_curvature_and_the_threshold_of_the_catalogue(optimizer, threshold):
    for found in run(optimizer, 4):
        assert found.curvature == pytest.approx(3.0, rel=1e-5)
        assert found.threshold == pytest.approx(threshold, rel=1e-5)
        assert found.ratio == pytest.approx(3.0 / threshold, rel=1e-5)
        assert found.largest_stable_lr / 0.5 == pytest.approx(1.0 / found.ratio, rel=0.1)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam])
def test_preconditioned_updates_are_measured_in_their_own_metric(kind):
    small, large = (run(partial(kind, lr=rate), 6)[-1] for rate in (1e-4, 1e-3))
    assert large.ratio / small.ratio == pytest.approx(10.0, rel=0.1)
    assert large.curvature > 3.0  # over the root of a mean square gradient below 1


def test_what_has_no_threshold_says_so():
    model = nn.Linear(2, 1)
    with pytest.raises(ArgumentError):
        SecantCurvature(model, SGD(nn.Linear(2, 1).parameters(), lr=0.1))
    adam = torch.optim.Adam(model.parameters())
    secant = SecantCurvature(model, adam)
    model(torch.ones(1, 2)).sum().backward()
    secant.hold(secant.point())
    with pytest.raises(NotYetError):
        secant.between(secant.point())


@pytest.mark.parametrize("options", [{"weight_decay": 2.0}, {"weight_decay": 2.0, "betas": (0.5, 0.999)}])
def test_the_largest_rate_under_decoupled_decay_is_found_without_a_search(options):
    """The interval is found by exact arithmetic, at two rates and not anew with every correction of early updates."""
    before = adam.cache_info().misses
    assert len(run(partial(torch.optim.AdamW, lr=0.1, **options), 12)) == 11
    assert adam.cache_info().misses - before <= 2
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    update = read_update(optimizer, model)
    for curvature in (0.1, 3.0, 1000.0):
        rate = Stability.of(update, curvature).largest_stable_lr
        assert float(update.build(rate).real_interval()) == pytest.approx(rate * curvature, rel=1e-9)
