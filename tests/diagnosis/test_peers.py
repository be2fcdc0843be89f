from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import examine
from stabkit.diagnosis.blocks.peers import FLOOR, deviation
from stabkit.diagnosis.blocks.weights import role_of


def test_the_spread_of_the_others_is_their_standard_deviation_when_they_are_normal():
    values = np.random.default_rng(0).normal(2.0, 0.5, 4000)
    found = deviation([10.0, *values], 0)
    assert (found.typical, found.spread) == pytest.approx((2.0, 0.5), rel=0.05)
    assert found.exceeds(1.0, 6.0)
    assert not found.exceeds(1.0, 20.0)
    assert not found.exceeds(9.0, 6.0)


def test_one_fault_does_not_accuse_its_peers():
    values = [0.0, 0.1, 3.0, -0.1, 0.05]
    accused = [i for i in range(5) if deviation(values, i).exceeds(1.0, 6.0)]
    assert accused == [2]
    assert deviation([1.0] * 4, 0).spread == FLOOR


def test_nothing_among_something_is_a_fault_and_nothing_among_nothing_is_not():
    assert deviation([-math.inf, 0.0, 0.1, 0.0], 0).exceeds(1.0, 6.0)
    assert not deviation([-math.inf] * 4, 0).exceeds(1.0, 6.0)
    assert not deviation([1.0], 0).exceeds(0.0, 0.0)


def test_two_kinds_that_take_turns_accuse_nobody():
    values = [0.0, 3.0] * 5
    assert not any(deviation(values, i).exceeds(1.0, 6.0) for i in range(10))


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("0.weight", "*.weight"),
        ("layer3.1.conv2.weight", "layer*.*.conv2.weight"),
        ("h.11.mlp.c_fc.bias", "h.*.mlp.c_fc.bias"),
        ("weight", "weight"),
    ],
)
def test_roles_forget_which_block_it_is(path, role):
    assert role_of(path) == role


class Normed(nn.Module):
    """x + f(norm(x)), where the norm may be left out, as first blocks of stages do."""

    def __init__(self, size: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size) if norm else nn.Identity()
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.tanh(self.norm(x)))


def test_a_norm_that_few_peers_have_is_missed_only_where_the_gain_differs():
    torch.manual_seed(0)
    model = nn.Sequential(*[Normed(32, norm=i != 2) for i in range(4)])
    for block in model:
        block.layer.weight.data.mul_(0.05)
    found = examine(stabkit.trace(model, 0.3 * torch.randn(8, 32))).findings
    assert [f.severity for f in found if "norm less" in f.evidence] == ["info"]
