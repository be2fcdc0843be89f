from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import jacobian

import stabkit
from stabkit.errors import TraceError
from stabkit.growth import finite_time, finite_time_exponents, gradient_profile
from stabkit.growth.qr_sweep import propagate
from tests.growth import systems
from tests.growth.systems import DOUBLE, normal


@pytest.mark.parametrize(("t", "known"), [(1, 0.42498208), (10, 0.13623438), (200, -0.07834202)])
def test_a_jordan_block_grows_before_it_decays(t, known):
    found = finite_time_exponents(systems.jordan(t))
    assert abs(float(found.exponents[0, 0]) - known) < 1e-8
    assert found.converged.all()


def test_orthogonal_layers():
    found = finite_time_exponents(systems.orthogonal_layers(60, 8, 0.7))
    torch.testing.assert_close(found.exponents, torch.full((1, 8), math.log(0.7), dtype=DOUBLE), rtol=0, atol=1e-12)


def test_products_beyond_the_range_of_floats_against_many_digits():
    matrices = [
        normal(4, 4, seed=s) @ torch.diag(torch.tensor([40.0, 5.0, 0.3, 0.02], dtype=DOUBLE)) for s in range(160)
    ]
    W = torch.stack(matrices).unsqueeze(1)
    flow = stabkit.iterate(lambda x, w: systems.apply(w, x), torch.zeros(1, 4, dtype=DOUBLE), len(W), inputs=W)
    with mpmath.workdps(900):
        product = mpmath.eye(4)
        for matrix in matrices:
            product = mpmath.matrix(matrix.tolist()) * product
        exact = [float(mpmath.log(s)) for s in mpmath.svd_r(product, compute_uv=False)]
    assert (exact[0] - exact[-1]) / math.log(10) > 300
    found = finite_time_exponents(flow)
    torch.testing.assert_close(found.log_singular_values[0], torch.tensor(exact, dtype=DOUBLE), rtol=1e-10, atol=0)
    few = finite_time_exponents(flow, 2)
    torch.testing.assert_close(few.exponents, found.exponents[:, :2], rtol=1e-9, atol=0)


def test_a_range_of_ten_to_the_six_hundred():
    A = torch.tensor([[0.01, 1.0], [0.0, 100.0]], dtype=DOUBLE)
    found = finite_time_exponents(systems.linear(A, 150))
    # A^t is upper triangular: the larger singular value is its last column's norm, the product is det = 1
    largest = math.log(100) + 0.5 / 150 * math.log1p((1 / (100 - 0.01)) ** 2)
    expected = torch.tensor([largest, -largest], dtype=DOUBLE)
    torch.testing.assert_close(found.exponents[0], expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_short_products_against_the_dense_svd(width, steps, seed):
    W = normal(steps, 2, width, width, seed=seed)
    flow = stabkit.iterate(lambda x, w: systems.apply(w, x), torch.zeros(2, width, dtype=DOUBLE), steps, inputs=W)
    product = W[0]
    for factor in W[1:]:
        product = factor @ product
    dense = torch.linalg.svdvals(product).log()
    torch.testing.assert_close(finite_time_exponents(flow).log_singular_values, dense, rtol=1e-6, atol=1e-8)


def test_a_traced_network_against_its_dense_jacobian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    x = normal(3, 5)
    dense = torch.stack([torch.linalg.svdvals(jacobian(model, point))[:4].log() for point in x])
    found = finite_time_exponents(stabkit.trace(model, x))
    torch.testing.assert_close(found.log_singular_values, dense, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.exponents, dense / 5, rtol=0, atol=1e-9)


def test_gradient_growth_lies_between_the_extreme_exponents():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(10)]).double()
    flow = stabkit.trace(model, normal(4, 6))
    exponents, rate = finite_time_exponents(flow).exponents, gradient_profile(flow).total_growth / len(flow)
    assert (exponents[:, -1] <= rate).all()
    assert (rate <= exponents[:, 0]).all()


def test_directions_that_rounding_made_are_not_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)), nn.Linear(4, 4)).double()
    found = finite_time_exponents(stabkit.trace(model, normal(1, 4), depth=["0", "1"]))
    assert found.exponents[0, 2:].isneginf().all()
    assert found.exponents[0, :2].isfinite().all()


def test_one_pass_cannot_measure():
    with pytest.raises(TraceError, match="max_passes=1"):
        finite_time_exponents(systems.jordan(3), max_passes=1)


def test_a_run_that_is_cut_short_says_so():
    W = normal(3, 1, 40, 40)
    flow = stabkit.iterate(lambda x, w: systems.apply(w, x), torch.zeros(1, 40, dtype=DOUBLE), 3, inputs=W)
    assert not finite_time_exponents(flow, 8, max_passes=2).converged.any()


def test_an_interrupt_returns_what_earlier_passes_found(monkeypatch):
    calls = [0]

    def interrupted(*args, **options):
        calls[0] += 1
        if calls[0] > allowed:
            raise KeyboardInterrupt
        return propagate(*args, **options)

    monkeypatch.setattr(finite_time, "propagate", interrupted)
    flow = systems.jordan(10)
    allowed = 2
    found = finite_time_exponents(flow)
    assert (found.stopped, found.passes) == ("interrupted", 2)
    assert not found.converged.any()
    allowed, calls[0] = 12, 0
    torch.testing.assert_close(found.exponents, finite_time_exponents(flow).exponents, rtol=0, atol=1e-6)
    allowed, calls[0] = 1, 0
    with pytest.raises(KeyboardInterrupt):
        finite_time_exponents(flow)


def test_a_step_size_is_positive():
    with pytest.raises(TraceError, match=r"step_size=-1.0; expected a positive number"):
        finite_time_exponents(systems.jordan(10), step_size=-1.0)


@pytest.mark.parametrize("k", [1, 3])
def test_close_singular_values_are_found_by_following_more_directions(k):
    # a frame of 2 k vectors alone was still off by 1e-3 after 12 passes
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(48, 48, bias=False, dtype=DOUBLE) for _ in range(3)])
    product = model[2].weight @ model[1].weight @ model[0].weight
    found = finite_time_exponents(stabkit.trace(model, torch.zeros(1, 48, dtype=DOUBLE)), k)
    truth = torch.linalg.svdvals(product.detach())[:k].log()
    assert found.converged.all()
    assert found.width > 2 * k + 4
    torch.testing.assert_close(found.log_singular_values[0], truth, rtol=0, atol=1e-10)
