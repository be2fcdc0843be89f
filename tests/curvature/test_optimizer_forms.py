"""Optimizers in the forms that torch gives them, and states that are not whole."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from stabkit.curvature import NotYetError, SharpnessTracker, critical_rate, sharpness
from stabkit.curvature.updates import read_update
from stabkit.errors import StabkitError
from tests.curvature.test_hard_cases import X, dense, entropy, mlp, state


def trained(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        entropy(model(X)).backward()
        optimizer.step()
    return optimizer


OPTIMIZERS = {
    "rate as a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "for loops": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_in_all_their_forms(name):
    model = mlp()
    optimizer = trained(model, OPTIMIZERS[name](model.parameters()))
    plain = copy.deepcopy(model)
    before = state(model, optimizer)
    found = sharpness(model, X, loss=entropy, optimizer=optimizer, tol=1e-6)
    assert state(model, optimizer) == before
    assert found.learning_rate == pytest.approx(0.1)
    P = torch.ones(1)
    if "max_exp_avg_sq" in optimizer.state[model[0].weight] or "exp_avg_sq" in optimizer.state[model[0].weight]:
        key = "max_exp_avg_sq" if name == "amsgrad" else "exp_avg_sq"
        P = torch.cat(
            [(optimizer.state[p][key] / (1 - 0.999**2)).sqrt().add(1e-8).reshape(-1) for p in model.parameters()]
        )
    parameters = list(plain.parameters())
    grads = torch.autograd.grad(entropy(plain(X)), parameters, create_graph=True)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(entry, parameters, retain_graph=True)])
        for entry in torch.cat([g.reshape(-1) for g in grads])
    ]
    H = torch.stack(rows) / P.sqrt() / P.sqrt()[:, None]
    assert found.preconditioned[0] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)
    assert SharpnessTracker(model, lambda: entropy(model(X)), optimizer).measure().ratio > 0


def test_a_group_that_stands_still_is_held_fixed():
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    truth = dense(model, X, parameters=list(model[2].parameters()))[0]
    found = sharpness(model, X, loss=entropy, optimizer=optimizer)
    assert found.preconditioned[0] == pytest.approx(truth, rel=1e-3)
    assert found.threshold == pytest.approx(20.0)
    tracked = SharpnessTracker(model, lambda: entropy(model(X)), optimizer).measure()
    assert tracked.sharpness == pytest.approx(truth, rel=0.05)


def test_a_state_that_was_loaded_serves():
    model = mlp()
    first = trained(model, torch.optim.Adam(model.parameters(), lr=0.1))
    second = torch.optim.Adam(model.parameters())
    second.load_state_dict(first.state_dict())
    found = [sharpness(model, X, loss=entropy, optimizer=o) for o in (first, second)]
    assert found[0].ratio == found[1].ratio
    second.state.pop(model[0].weight)
    with pytest.raises(StabkitError, match="has made no update of a parameter of shape"):
        sharpness(model, X, loss=entropy, optimizer=second)


@pytest.mark.parametrize("rate", [0.0, float("nan")])
def test_a_rate_that_is_no_step_is_refused(rate):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    for measure in (sharpness, critical_rate):
        with pytest.raises(StabkitError):
            measure(model, X, loss=entropy, optimizer=optimizer)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.sub_(0.01 * (0.9 * moment + 0.1 * p.grad).sign())
            moment.mul_(0.99).add_(p.grad, alpha=0.01)


class Counting(torch.optim.SGD):
    """Makes the updates of its base, and counts them."""

    made = 0

    def step(self, closure=None):
        self.made += 1
        return super().step(closure)


class Halving(torch.optim.SGD):
    """Makes half the updates of its base."""

    def step(self, closure=None):
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        super().step(closure)
        with torch.no_grad():
            for p, old in zip(self.param_groups[0]["params"], before, strict=True):
                p.lerp_(old, 0.5)


class Named(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})


Named.__name__ = "Adam"
WITHOUT = {
    "Lion": Lion,
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.1),
    "a name alone": Named,
    "a step of its own": lambda p: Halving(p, lr=0.1),
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", WITHOUT)
def test_an_optimizer_without_a_threshold_is_refused_and_its_coming_update_is_not(name):
    model = mlp()
    optimizer = WITHOUT[name](model.parameters())
    with pytest.raises(StabkitError, match="no threshold in curvature is known"):
        sharpness(model, X, loss=entropy, optimizer=optimizer)
    if name != "a name alone":
        assert critical_rate(model, X, loss=entropy, optimizer=trained(model, optimizer)).factor > 0


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"maximize": True}, {"weight_decay": 0.1, "nesterov": False}])
def test_a_class_of_ones_own_that_makes_the_updates_of_its_base_has_its_threshold(options):
    model = mlp()
    own, base = (kind(model.parameters(), lr=0.1, **options) for kind in (Counting, torch.optim.SGD))
    found = [sharpness(model, X, loss=entropy, optimizer=optimizer).threshold for optimizer in (own, base)]
    assert found[0] == found[1]
    assert own.made == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_what_climbs_one_loss_has_the_ratio_of_what_goes_down_minus_it(kind):
    ratios = []
    for sign in (1.0, -1.0):
        model = mlp()
        optimizer = kind(model.parameters(), lr=0.1, maximize=sign < 0)
        for _ in range(3):
            optimizer.zero_grad()
            (sign * entropy(model(X))).backward()
            optimizer.step()
        ratios.append(sharpness(model, X, loss=lambda out, s=sign: s * entropy(out), optimizer=optimizer).ratio)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
    assert ratios[0] > 0


FLAGS = ("foreach", "fused", "capturable", "differentiable")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax, torch.optim.Adagrad])
def test_how_an_update_is_computed_is_no_part_of_it(kind, flag):
    model = mlp()
    optimizer = trained(model, kind(model.parameters(), lr=0.1), 3)
    before = sharpness(model, X, loss=entropy, optimizer=optimizer).ratio
    for group in optimizer.param_groups:
        group[flag] = True
    for state_of in optimizer.state.values():
        state_of["step"] = torch.as_tensor(state_of["step"])
    assert sharpness(model, X, loss=entropy, optimizer=optimizer).ratio == before


def test_masks_of_dropout_are_held_and_told():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = [sharpness(model, X, loss=entropy, optimizer=optimizer, seed=seed) for seed in (0, 0, 1)]
    assert found[0].values == found[1].values != found[2].values
    assert "under one draw, of seed 0" in str(found[0])
    tracked = SharpnessTracker(model, lambda: entropy(model(X)), optimizer).measure()
    assert tracked.sharpness == pytest.approx(found[0].values[0], rel=1e-2)
    assert sharpness(model.eval(), X, loss=entropy, optimizer=optimizer).notes == ()


FIRST = {
    "Adam": partial(torch.optim.Adam, weight_decay=0.1),
    "Amsgrad": partial(torch.optim.Adam, amsgrad=True, maximize=True),
    "NAdam": torch.optim.NAdam,
    "Adamax": torch.optim.Adamax,
    "RMSprop": partial(torch.optim.RMSprop, weight_decay=0.1),
    "RMSprop, centred": partial(torch.optim.RMSprop, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.5),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_preconditioner_of_the_first_update_is_that_which_it_is_made_with(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = FIRST[name](model.parameters(), lr=0.01)
    with pytest.raises(NotYetError):
        read_update(optimizer, model, first=True)  # without a gradient
    model(torch.randn(4, 3).double()).square().sum().backward()
    with pytest.raises(NotYetError):
        read_update(optimizer, model)
    update = read_update(optimizer, model, first=True)
    assert update.young
    before = [p.detach().clone() for p in model.parameters()]
    decay, sign = optimizer.param_groups[0]["weight_decay"], -1 if optimizer.param_groups[0]["maximize"] else 1
    slopes = [sign * p.grad + decay * p.detach() for p in model.parameters()]
    optimizer.step()
    made = [0.01 * g / s for g, s in zip(slopes, update.scales, strict=True)]
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    times = torch.cat([(m / u).flatten() for m, u in zip(moved, made, strict=True)])
    assert torch.allclose(times, times[0].expand_as(times))
    assert name == "NAdam" or times[0].item() == pytest.approx(1.0)
