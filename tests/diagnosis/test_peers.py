from __future__ import annotations

import cProfile
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import examine
from stabkit.diagnosis.blocks.outliers import local_findings
from stabkit.diagnosis.blocks.peers import FLOOR, Peers, deviation
from stabkit.diagnosis.blocks.weights import role_of
from stabkit.diagnosis.measurement import measure
from stabkit.diagnosis.thresholds import Thresholds


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


def test_all_values_put_in_order_once_lie_where_each_lies_beside_the_others_alone():
    draw = np.random.default_rng(0)
    for count in range(1, 14):
        for odd in ([], [math.inf], [-math.inf], [math.nan], [-math.inf, math.nan]):
            pool = [*draw.normal(size=draw.integers(1, 9)), *odd]  # few, so that some are equal
            values = [float(draw.choice(pool)) for _ in range(count)]
            peers = Peers(values)
            for index, value in enumerate(values):
                others = np.array([other for at, other in enumerate(values) if at != index and not math.isnan(other)])
                with np.errstate(invalid="ignore"):
                    typical = float(np.median(others)) if len(others) else math.nan
                    away, nearer = np.abs(others - typical), np.abs(others - value)
                found = peers.deviation(index)
                assert found.peers == len(others)
                assert found.typical == pytest.approx(typical, nan_ok=True)
                if math.isfinite(typical):
                    assert found.spread == pytest.approx(max(1.4826 * np.median(away), FLOOR))
                    assert found.company == np.mean((others == value) | (nearer < away))


def test_blocks_are_held_against_their_peers_with_work_that_grows_as_they_do():
    counts = []
    for depth in (20, 80):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)])
        measurement = measure(stabkit.trace(model, torch.randn(2, 4)))
        profile = cProfile.Profile()
        profile.runcall(local_findings, measurement, Thresholds())
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    assert counts[1] < 6 * counts[0]  # calls of functions: 4 times as many, and 9 where all are read for each


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
