"""On quadratics every optimizer of torch itself stays bounded at .97 of its threshold and blows up at 1.03 of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabkit.curvature import sharpness
from stabkit.curvature.updates import read_update

CURVATURES = torch.tensor([1.0, 4.0, 30.0], dtype=torch.float64)


class Bowl(nn.Module):
    """theta, whose loss below is half the sum of curvature theta^2."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))

    def forward(self, x):
        return self.theta * x


def loss(output):
    return (CURVATURES * output.square()).sum() / 2


X = torch.ones(3, dtype=torch.float64)
SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"momentum": 0.9, "weight_decay": 2.0},
    "nesterov, decay": {"momentum": 0.5, "nesterov": True, "weight_decay": 1.0},
}


def peak(optimizer, model, steps):
    """The largest size of the weights on the way over that at first: an adaptive rate ends a blow-up by itself."""
    with torch.no_grad():
        model.theta.mul_(1e-4)
    largest = begin = float(model.theta.detach().abs().max())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
        largest = max(largest, float(model.theta.detach().abs().max()))
    return largest / begin


@pytest.mark.parametrize("name", SGDS)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_gradient_descent_is_bounded_below_its_threshold_and_not_above(name, factor):
    model = Bowl()
    found = sharpness(model, X, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.01, **SGDS[name]))
    assert found.values[0] == pytest.approx(30.0, rel=1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=found.largest_stable_lr * factor, **SGDS[name])
    again = sharpness(model, X, loss=loss, optimizer=optimizer)
    assert again.ratio == pytest.approx(factor, rel=0.05 if "decay" in name else 1e-6)
    assert (again.ratio < 1) == (factor < 1)
    assert (peak(optimizer, model, 400) < 100) == (factor < 1)


def frozen(kind, model, lr, **options):
    """An optimizer whose second moments are so old that they do not move, and whose corrections are over."""
    optimizer = kind(model.parameters(), lr=lr, **options)
    loss(model(X)).backward()
    optimizer.step()
    with torch.no_grad():
        model.theta.copy_(torch.tensor([1.0, 0.5, 0.25]))
    state = optimizer.state[model.theta]
    for key in ("exp_avg", "momentum_buffer", "grad_avg"):
        if key in state:
            state[key].zero_()
    for key in ("exp_avg_sq", "square_avg", "max_exp_avg_sq"):
        if key in state:
            state[key].copy_(torch.tensor([4.0, 9.0, 1.0]))
    if "exp_inf" in state:
        state["exp_inf"].copy_(torch.tensor([2.0, 3.0, 1.0]))
    if "sum" in state:
        state["sum"].copy_(torch.tensor([4e12, 9e12, 1e12]))
    if "step" in state and kind is not torch.optim.Adagrad:
        state["step"].fill_(100_000)
    if "mu_product" in state:
        state["mu_product"].zero_()
    return optimizer


STILL = 1.0 - 1e-12
ADAPTIVE = {
    "Adam": (torch.optim.Adam, {"betas": (0.9, STILL)}),
    "Adam, beta1 = .5": (torch.optim.Adam, {"betas": (0.5, STILL)}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.9, STILL), "weight_decay": 1e-5}),
    "AMSGrad": (torch.optim.Adam, {"betas": (0.9, STILL), "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"betas": (0.9, STILL)}),
    "Adamax": (torch.optim.Adamax, {"betas": (0.9, 1.0 - 1e-9)}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": STILL}),
    "RMSprop, momentum": (torch.optim.RMSprop, {"alpha": STILL, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_preconditioner_that_stays_gives_the_threshold_of_the_method(name, factor):
    kind, options = ADAPTIVE[name]
    model = Bowl()
    found = sharpness(model, X, loss=loss, optimizer=frozen(kind, model, 1e-3, **options))
    model = Bowl()
    optimizer = frozen(kind, model, found.largest_stable_lr * factor, **options)
    again = sharpness(model, X, loss=loss, optimizer=optimizer)
    assert again.ratio == pytest.approx(factor, rel=1e-3)
    assert (peak(optimizer, model, 600) < 100) == (factor < 1)


def test_adam_has_38_over_its_rate():
    model = Bowl()
    found = sharpness(model, X, loss=loss, optimizer=frozen(torch.optim.Adam, model, 0.01, betas=(0.9, STILL)))
    assert found.threshold == pytest.approx(3800.0)
    # v / (1 - beta2^t) at t = 100,000: the second moments are 1e7 times those of the state
    assert found.preconditioned[0] == pytest.approx(30.0 / math.sqrt(1.0 / (1 - STILL**100_000)), rel=1e-6)


def test_the_first_updates_of_adam_bear_less():
    model = Bowl()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss(model(X)).backward()
    optimizer.step()
    update = read_update(optimizer, model)
    assert update.interval(0.01) == pytest.approx(38 * (1 - 0.9**2))


def test_groups_with_rates_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1).double()), nn.Parameter(torch.ones(1).double())

        def forward(self, x):
            return torch.stack([self.a, self.b])

    model = Two()
    groups = [{"params": [model.a], "lr": 0.1}, {"params": [model.b], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    found = sharpness(
        model, X, loss=lambda out: 4 * out[0].square().sum() + 30 * out[1].square().sum(), optimizer=optimizer
    )
    assert found.values[0] == pytest.approx(60.0)
    assert found.preconditioned[0] == pytest.approx(8.0)  # 60 at a tenth of the rate is 6
    assert found.ratio == pytest.approx(0.4)


def test_what_maximizes_climbs():
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    found = sharpness(model, X, loss=lambda out: -loss(out), optimizer=optimizer)
    assert found.values[0] == pytest.approx(30.0)
    assert found.ratio == pytest.approx(1.5)
