"""Unrolled optimisation: which iteration a network is, told by its operations alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

from . import optimisation_models as models
from .optimisation_models import ADMM, MEASURED, ChambollePock

DIVIDED = ("fork", "join", "transition", "plain", "linear recurrence", "momentum (gamma = 0)")


def inner(model: nn.Module, scale: float = 1.0, shape: tuple[int, ...] = (MEASURED,)):
    """What is read of the rounds but for the first and the last, which lack operations."""
    x = scale * torch.randn(3, *shape)
    found = [r for r in identify(trace(model, x)) if not r.name.startswith(DIVIDED)]
    return found[1:-1]


PROXIMAL = [
    (models.ISTA, "forward Euler, then", None),
    (models.ClampedISTA, "forward Euler, then", None),
    (models.FISTA, r"Nesterov momentum (gamma = 0.", "forward-backward"),
    (models.ConstantFISTA, "Nesterov momentum (gamma = 0.5), then", "forward-backward"),
    (models.Nonnegative, "Nesterov momentum (gamma = 0.5), then", "forward-backward"),
    (models.HeavyBall, "two-step (LM-ResNet, k = -0.4), then", "forward-backward"),
    (lambda: ChambollePock(1.0), "primal-dual hybrid gradient (Chambolle-Pock, theta = 1), then", "proximal"),
    (lambda: ChambollePock(0.5), "primal-dual hybrid gradient (Chambolle-Pock, theta = 0.5), then", "proximal"),
    (lambda: ChambollePock(0.0), "primal-dual hybrid gradient (Arrow-Hurwicz), then", "proximal"),
]


@pytest.mark.parametrize(("make", "name", "kind"), PROXIMAL)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_proximal_map_behind_a_step_leaves_its_method_what_it_is(make, name, kind, scale):
    torch.manual_seed(0)
    found = inner(make(), scale)
    assert len(found) >= 2
    for record in found:
        assert record.name.startswith(name)
        assert kind is None or (record.name.endswith(f"({kind})") and record.evidence == "measured")


def test_the_first_round_of_learned_thresholding_begins_at_zero():
    torch.manual_seed(0)
    found = identify(trace(models.LISTA(), torch.randn(3, MEASURED)))
    names = [record.name for record in found if not record.name.startswith(DIVIDED)]
    assert names == ["linear step, then soft threshold (forward-backward)"] * 6
    small = identify(trace(models.LISTA(), 0.01 * torch.randn(3, MEASURED)))  # of which the threshold leaves nothing
    assert not any("backward_euler" in record.name for record in small)


def test_what_a_clamp_leaves_is_the_soft_threshold():
    torch.manual_seed(0)
    found = inner(models.ClampedISTA())
    assert {record.name for record in found} == {"forward Euler, then soft threshold (forward-backward)"}
    assert {record.after for record in found} == {("Clamp", "Sub")}


def test_a_step_without_the_adjoint_of_its_operator_is_no_primal_dual_method():
    torch.manual_seed(0)
    assert not any(r.name.startswith("primal-dual") for r in inner(ChambollePock(adjoint=False)))


DIRECTIONS = [
    ({}, "ADMM"),
    ({"step": 0.6}, "ADMM (dual step 0.6)"),
    ({"learned": True}, "ADMM"),
    ({"solve": True}, "ADMM"),
]


@pytest.mark.parametrize(("options", "name"), DIRECTIONS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_alternating_directions_are_told_by_how_each_operator_answers_the_other(options, name, scale):
    torch.manual_seed(0)
    found = inner(ADMM(**options), scale)
    assert len(found) >= 2
    assert {(r.name, r.evidence) for r in found} == {(name, "proven")}


@pytest.mark.parametrize(
    ("make", "shape"), [(models.LearnedPrimalDual, (MEASURED,)), (models.LearnedPrimalDualOfImages, (1, 6, 6))]
)
def test_primal_and_dual_networks_take_turns(make, shape):
    torch.manual_seed(0)
    found = inner(make(), shape=shape)
    assert len(found) >= 2
    assert {r.name for r in found} == {"Gauss-Seidel Euler of 2 coupled states"}


class Normalised(nn.Module):
    """A look-alike: a norm follows each step of the momentum, which is no proximal map."""

    def __init__(self):
        super().__init__()
        self.field, self.norm = models.network(), nn.LayerNorm(models.WIDTH)

    def forward(self, x):
        old = x
        for _ in range(5):
            z = x + 0.5 * (x - old)
            old, x = x, self.norm(z + 0.1 * self.field(z))
        return x


def test_a_norm_behind_a_step_is_no_proximal_map():
    torch.manual_seed(0)
    found = identify(trace(Normalised(), torch.randn(3, models.WIDTH)))
    assert not any("forward-backward" in r.name for r in found)
