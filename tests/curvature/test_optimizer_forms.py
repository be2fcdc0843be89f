"""Optimizers in the forms that torch gives them, and states that are not whole."""

from __future__ import annotations

import copy

import pytest
import torch

from stabkit.curvature import SharpnessTracker, critical_rate, sharpness
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
