from __future__ import annotations

import math

import mpmath
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.growth.finite_time import log_singular_values, tournament
from tests.growth.systems import DOUBLE, normal


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_singular_values_of_ordinary_rows_are_those_of_lapack(count, seed):
    rows = normal(2, count, count, seed=seed)
    found = log_singular_values(rows, torch.zeros(2, count, dtype=DOUBLE))
    torch.testing.assert_close(found.exp(), torch.linalg.svdvals(rows), rtol=1e-7, atol=1e-12)


def test_rows_of_any_scale_against_many_digits():
    rows = torch.eye(4, dtype=DOUBLE) + 0.5 * normal(4, 4)
    scales = torch.tensor([1000.0, 999.5, -3.0, -2000.0], dtype=DOUBLE)
    with mpmath.workdps(2500):
        matrix = mpmath.matrix(rows.tolist())
        for i in range(4):
            for j in range(4):
                matrix[i, j] *= mpmath.exp(scales[i].item())
        exact = [float(mpmath.log(s)) for s in mpmath.svd_r(matrix, compute_uv=False)]
    found = log_singular_values(rows.unsqueeze(0), scales.unsqueeze(0))
    torch.testing.assert_close(found[0], torch.tensor(exact, dtype=DOUBLE), rtol=0, atol=1e-10)


def test_a_row_of_zeros_has_no_value():
    rows = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], dtype=DOUBLE)
    found = log_singular_values(rows, torch.zeros(1, 2, dtype=DOUBLE))
    assert found[0, 1] == -math.inf
    assert math.isclose(float(found[0, 0]), 0.5 * math.log(5))


@given(st.integers(2, 30))
def test_everyone_meets_everyone_once(count):
    rounds = tournament(count)
    pairs = sorted(tuple(sorted(pair)) for first, second in rounds for pair in zip(first, second, strict=True))
    assert pairs == [(i, j) for i in range(count) for j in range(i + 1, count)]
    assert all(len({*first, *second}) == 2 * len(first) for first, second in rounds)
