"""A loss in which every sample meets the targets of all is told; outer products that are meant are not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

X = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
Y = X.sum(1)
WEIGHTS = torch.rand(64, generator=torch.Generator().manual_seed(2))


def said(loss: Callable[[Tensor], Tensor], last: nn.Module | None = None, x: Tensor = X) -> list[Finding]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1), last or nn.Identity())
    return [f for f in examine(stabkit.trace(model, x), loss).findings if f.kind == "loss"]


MIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "difference": (lambda out: (out - Y).square().mean(), "sub"),
    "the other way": (lambda out: (Y - out).abs().mean(), "sub"),
    "function": (lambda out: functional.mse_loss(out, Y), "mse_loss"),
    "module": (lambda out: nn.HuberLoss()(out, target=Y), "huber_loss"),
    "weights of samples": (lambda out: ((out - Y[:, None]).square() * WEIGHTS).mean(), "mul"),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", MIXED)
def test_a_column_of_outputs_beside_a_row_of_targets_is_told_with_both_shapes(name: str):
    loss, operation = MIXED[name]
    (found,) = said(loss)
    assert (found.severity, found.module_path, found.numbers["samples"]) == ("warning", "loss", 64.0)
    assert f"{operation} in the loss" in found.evidence
    assert "(64, 1)" in found.evidence
    assert "to (64, 64)" in found.evidence
    assert "shuffled" in found.evidence
    assert "test_mixed_samples.py:" in found.evidence
    assert "squeeze" in found.remedy


def test_a_row_of_outputs_beside_a_column_of_targets_is_the_same():
    target = Y.reshape(-1, 1)
    (found,) = said(lambda out: (out - target).square().mean(), nn.Flatten(0))
    assert found.severity == "warning"
    assert "squeeze the dimension of 1 of (64, 1)" in found.remedy


def test_it_is_worth_what_training_on_equal_shapes_is_worth():
    (found,) = said(MIXED["difference"][0])
    mixed, aligned = (float(found.evidence.rsplit("take that to ", 1)[1].split()[i].strip(",")) for i in (0, 9))
    assert aligned < mixed


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: (out.squeeze(1) - Y).square().mean(),
        lambda out: (out - Y[:, None]).square().mean(),
        lambda out: functional.softplus(-(out - out.squeeze(1)) * (Y[:, None] - Y).sign()).mean(),  # RankNet
        lambda out: (out[:, 0].unsqueeze(1) - Y).abs().min(1).values.mean(),  # to the nearest of a set
        lambda out: (out - out.T).square().mean() + (out - Y[None, :, None]).square().mean(),
        lambda out: (out - Y.mean()).square().mean(),
    ],
)
def test_what_holds_samples_one_to_one_or_against_each_other_on_purpose_raises_nothing(loss):
    assert said(loss) == []


def test_where_one_to_one_is_no_different_it_is_a_fact_and_no_fault():
    assert [f.severity for f in said(lambda out: (out - Y).mean().abs())] == ["info"]


def test_one_sample_is_not_mixed():
    assert said(lambda out: (out - Y[:1]).square().mean(), x=X[:1]) == []


class Bellman:
    """Squares of values of chosen actions beside targets of a network that is held, or of the one that is trained."""

    def __init__(self, model: nn.Module, held: bool) -> None:
        self.net = copy.deepcopy(model) if held else model
        self.action = torch.randint(0, 3, (64, 1), generator=torch.Generator().manual_seed(3))

    def __call__(self, out: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = Y + 0.9 * self.net(X.flip(0)).max(1)[0]
        return ((out.gather(1, self.action) - wanted) ** 2).mean()


@pytest.mark.parametrize("held", [True, False])
def test_a_trial_of_both_shapes_is_of_the_mended_loss_and_never_speaks_against_it(held: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3))
    loss = Bellman(model, held)
    (found,) = [f for f in examine(stabkit.trace(model, X), loss).findings if f.kind == "loss"]
    assert found.severity == "warning"
    trial = re.search(r"take that to (\S+) by the loss as it is, and to (\S+) by itself", found.evidence)
    if held:
        assert trial is not None
    if trial is not None:
        as_it_is, by_itself = map(float, trial.groups())
        assert by_itself < as_it_is
