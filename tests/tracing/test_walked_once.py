"""What can be reached from a model is walked once, and compared after that: what changed meanwhile is seen."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabkit.tracing.recording import untouched_model
from stabkit.tracing.recording.untouched_model import unchanged, walked_once


class Counting(nn.Module):
    """It holds things of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.numbers, self.inner = nn.Linear(2, 2), np.zeros(3), [{"seen": 0}]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every walk."""
    made: list[Any] = []

    class Counted(untouched_model.Reached):
        def __init__(self, *args: Any) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(untouched_model, "Reached", Counted)
    return made


def test_what_stays_is_walked_once(walks: list[Any]) -> None:
    model, x, kwargs = Counting(), torch.zeros(1), dict[str, Any]()
    with walked_once():
        for _ in range(3):
            with unchanged(model, model.forward, given=((x,), kwargs)):
                model.inner[0]["seen"] += 1
                model.inner.append(3)
                model.numbers += 1
            assert model.inner == [{"seen": 0}]
            assert not model.numbers.any()
    assert len(walks) == 1
    with unchanged(model):
        pass
    assert len(walks) == 2


CHANGES = {
    "an attribute": lambda model: setattr(model, "other", 3),
    "an entry far inside": lambda model: model.inner[0].update(seen=4),
    "a parameter": lambda model: setattr(model.linear, "weight", nn.Parameter(torch.ones(2, 2))),
    "a table of hooks": lambda model: model.linear.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_is_seen_and_comes_back_as_it_was_then(walks: list[Any], name: str) -> None:
    model = Counting()
    with walked_once():
        with unchanged(model):
            pass
        CHANGES[name](model)
        held = dict(vars(model)), dict(model.inner[0]), model.linear.weight, dict(model.linear._forward_hooks)
        with unchanged(model):
            model.inner[0].clear()
            vars(model)["other"] = 5
            model.linear.weight = nn.Parameter(torch.zeros(2, 2))
            model.linear._forward_hooks.clear()
        now = dict(vars(model)), dict(model.inner[0]), model.linear.weight, dict(model.linear._forward_hooks)
        assert all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(held, now, strict=True))
    assert len(walks) == 2


def test_numbers_of_an_array_come_back_as_they_were_at_each_beginning() -> None:
    model = Counting()
    with unchanged(model):
        model.numbers += 1
        with unchanged(model):
            model.numbers += 1
        assert (model.numbers == 1).all()
    assert not model.numbers.any()


def test_other_inputs_are_walked_by_themselves(walks: list[Any]) -> None:
    model, x, y, kwargs = Counting(), torch.zeros(1), torch.zeros(1), dict[str, Any]()
    with walked_once():
        for given in (x, y, x):
            with unchanged(model, given=((given,), kwargs)) as safe:
                assert id(given) in safe.reached.spared
    assert len(walks) == 2


def test_a_copy_does_not_outlive_its_trial() -> None:
    model = Counting()
    with walked_once():
        for other in (model, copy.deepcopy(model)):
            with unchanged(other):
                pass
        gone = weakref.ref(other)
        del other
        gc.collect()
        assert gone() is None
