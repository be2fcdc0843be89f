from __future__ import annotations

import pytest
import torch
from torch import nn

from . import language, perception, vision
from .zoo import Subject, examine, fingerprint, relative, table

SUBJECTS = [*vision.SUBJECTS, *language.SUBJECTS, *perception.SUBJECTS]


def linear_stack() -> tuple[nn.Module, tuple[torch.Tensor], dict]:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), (torch.randn(4, 3),), {}


def test_the_zoo_is_as_large_as_it_should_be():
    counts = {f: sum(s.family == f for s in SUBJECTS) for f in ("torchvision", "timm", "transformers")}
    assert counts["torchvision"] >= 22
    assert counts["timm"] >= 45
    assert len({s.build.__self__.model for s in SUBJECTS if s.family == "transformers"}) >= 42
    assert len({(s.family, s.name) for s in SUBJECTS}) == len(SUBJECTS)


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.fast], ids=str)
def test_fast_subset(subject, examined):
    result = examined(subject)
    assert result.passed, result.failure


# traced exactly, but cut into other steps than a person would name: what is still to be found in each
MISCOUNTED = {
    "raft_small": "updates that carry five tensors: the ladder of tuple states begins after the first",
    "coat_tiny": "the first block of the last stage shares its piece with the patch embedding before it",
    "efficientvim_m1": "blocks hand on a pair of which the last block of a stage drops one",
    "mobilenetv5_base": "the head fuses two stages, and the skips between them keep blocks together",
    "nasnetalarge": "around a reduction cell the outputs of two older cells live on",
}


def library_models():
    for subject in SUBJECTS:
        reason = MISCOUNTED.get(subject.name)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        yield pytest.param(subject, id=f"{subject.family} {subject.name}", marks=marks)


@pytest.mark.zoo
@pytest.mark.parametrize("subject", list(library_models()))
def test_library_model(subject, examined):
    result = examined(subject)
    assert result.passed, result.failure


# ---------------------------------------------------------------- the zoo's own teeth


def test_a_wrong_number_of_steps_is_a_failure():
    result = examine(Subject("stack", linear_stack, steps=3, blocks="Linear"))
    assert result.columns() == {
        "traced": True,
        "chain": True,
        "own backward": True,
        "replay": True,
        "unchanged": True,
        "steps": False,
    }
    assert "2 blocks instead of 3" in result.failure
    assert "1 of 2 pass every column" in table([result, examine(Subject("stack", linear_stack))])


def test_an_inexact_step_is_a_failure(monkeypatch):
    from stabkit.tracing.flow import Step

    exact = Step.vjp
    monkeypatch.setattr(Step, "vjp", lambda step, cotangents: [1.000001 * g for g in exact(step, cotangents)])
    result = examine(Subject("stack", linear_stack))
    assert 1e-7 < result.independent_error < 1e-5
    assert "own backward" in result.failure


def test_a_failing_forward_is_a_failure_with_its_cause():
    result = examine(Subject("stack", lambda: (nn.Linear(3, 3), (torch.randn(4, 2),), {})))
    assert not result.traced
    assert result.failure.startswith("RuntimeError: ")
    assert "mat1 and mat2 shapes" in result.failure


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.bias.data.add_(1e-7), "parameter .bias"),
        (lambda m: m.running_var.add_(0.0).neg_(), "buffer .running_var"),
        (lambda m: m.weight.requires_grad_(False), "parameter .weight"),
        (lambda m: setattr(m.weight, "grad", torch.zeros(3)), "gradient .weight"),
        (lambda m: m.eval(), "training "),
        (lambda m: m.register_forward_hook(print), "_forward_hooks "),
        (lambda m: setattr(m, "momentum", 0.2), "attribute .momentum"),
        (lambda m: torch.rand(1), "random state"),
    ],
    ids=["parameter", "buffer", "flag", "gradient", "mode", "hook", "attribute", "random"],
)
def test_every_kind_of_change_is_noticed(change, name):
    model = nn.BatchNorm1d(3)
    before = fingerprint(model, (), {})
    assert fingerprint(model, (), {}) == before
    change(model)
    after = fingerprint(model, (), {})
    assert before.get(name) != after.get(name)


def test_relative_error_sees_shapes_and_missing_numbers():
    ones = torch.ones(2, dtype=torch.float64)
    assert relative(ones, ones) == 0
    assert relative(1.5 * ones, ones) == pytest.approx(0.5)
    assert relative(ones, torch.ones(2, 1)) == float("inf")
    assert relative(ones, torch.tensor([1.0, torch.nan])) == float("inf")
