"""Trainings that several rules ask for are done once in a diagnosis, and never in the place of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.inputs.sizes import Sizes
from stabkit.diagnosis.remedies import short_training as short
from stabkit.diagnosis.remedies import usual_training as usual
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.made_once import made_once
from stabkit.diagnosis.remedies.short_training import short_training, trained_on_either, trained_with

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
LABELS = X[:, :4].argmax(1)


def classes(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, LABELS)


def network(*end: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4), *end)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each training was done, by all that decides it."""
    done: Counter[Any] = Counter()
    kept = []
    for module, name in ((short, "_trained"), (usual, "_left")):
        original = getattr(module, name)

        def counting(call: Any, *rest: Any, original: Any = original) -> Any:
            kept.append((call, rest))  # so that no other object gets the id
            others = tuple(id(each) if callable(each) else repr(each) for each in rest)
            done[(id(call.inputs[0]), *others)] += 1
            return original(call, *rest)

        monkeypatch.setattr(module, name, counting)
    return done


def large() -> nn.Module:
    model = network()
    for layer in model[::2]:
        nn.init.normal_(layer.weight, 0.0, 3.0)
    return model


@pytest.mark.parametrize("make", [lambda: network(nn.ReLU()), lambda: network(nn.Dropout(0.5)), large])
def test_no_training_of_a_diagnosis_is_done_twice(make: Callable[[], nn.Module], trained: Counter[Any]) -> None:
    stabkit.diagnose(stabkit.trace(make(), X), classes)
    assert trained
    assert set(trained.values()) == {1}


def test_after_a_diagnosis_all_is_trained_anew(trained: Counter[Any]) -> None:
    model = network(nn.ReLU())
    flow = stabkit.trace(model, X)
    short_training(flow, classes)
    short_training(flow, classes)
    assert set(trained.values()) == {2}


def test_other_weights_losses_inputs_remedies_and_contexts_are_other_trainings() -> None:
    model = network()
    flow = stabkit.trace(model, X)
    with made_once():
        plain = short_training(flow, classes)
        assert short_training(flow, classes) is plain
        action = {"action": "scale", "parameter": "4.weight", "factor": 3.0}
        others = [
            short_training(flow, lambda out: 2 * classes(out)),
            short_training(flow, classes, [action]),
            short_training(flow, classes, within=lambda: torch.autograd.set_grad_enabled(True)),
            short_training(stabkit.trace(model, X.clone()), classes),
            trained_with(flow, classes, Remedy("", data=Sizes(((flow.source_name, 2.0),)))),
            trained_with(flow, classes, Remedy("", data=Sizes(((flow.source_name, 4.0),)))),
        ]
        with torch.no_grad():
            model[4].weight.mul_(2.0)
        others.append(short_training(flow, classes))
    assert all(other is not plain for other in others)
    assert len({other.first for other in others}) >= 5


def test_a_run_that_breaks_off_ends_nowhere() -> None:
    """Of the rates that are tried, the large one makes what is trained infinite after a few steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.ones(4, 1)

    def loss(out: Tensor) -> Tensor:
        return (out - 1.02).square().mean() * (1.0 if float(out.detach().max()) < 1.025 else torch.inf)

    def meant(out: Tensor) -> Tensor:
        return (out - 1.5).square().mean()

    flow = stabkit.trace(model, x)
    watched = short_training(flow, loss, watch=lambda out: float(out.detach().max())).watched
    assert 0 < len(watched) < 2
    assert watched[0] < 1.025
    said = trained_on_either(flow, loss, meant, min)
    assert f"take that to {(1.5 - watched[0]) ** 2:.3g} by the loss as it is" in said
