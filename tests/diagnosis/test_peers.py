from __future__ import annotations

import math

import numpy as np
import pytest

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
