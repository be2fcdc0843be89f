from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.growth.qr_sweep import propagate, start_frame
from stabkit.tracing import Flow, Iteration
from tests.growth.systems import DOUBLE, apply, normal

STEPS = 24


def graded(size: int, spread: float, scale: float = 1.0) -> Tensor:
    """Random matrices whose directions grow at rates that differ by ``spread`` powers of ten."""
    Q, _ = torch.linalg.qr(normal(STEPS, size, size))
    P, _ = torch.linalg.qr(normal(STEPS, size, size, seed=1))
    return scale * Q @ torch.diag(torch.logspace(0, -spread, size, dtype=DOUBLE)) @ P


def over_depth(W: Tensor, dtype: torch.dtype = DOUBLE) -> Flow:
    model = nn.Sequential(*[nn.Linear(W.shape[1], W.shape[1], bias=False) for _ in W]).to(dtype)
    for layer, weight in zip(model, W, strict=True):
        layer.weight.data = weight.to(dtype)
    return stabkit.trace(model, torch.zeros(1, W.shape[1], dtype=dtype), check=False)


def over_time(W: Tensor) -> Iteration:
    start = torch.zeros(1, W.shape[1], dtype=DOUBLE)
    return stabkit.iterate(lambda x, w: apply(w, x), start, len(W), inputs=W.unsqueeze(1))


def by_householder(W: Tensor, frame: Tensor) -> Tensor:
    growth = []
    for matrix in W:
        frame, R = torch.linalg.qr(matrix @ frame)
        growth.append(R.diagonal(dim1=-2, dim2=-1).abs().log())
    return torch.stack(growth)


@pytest.mark.parametrize("make", [over_depth, over_time])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_growth_is_that_of_a_decomposition_after_every_step(make, spread):
    W = graded(6, spread)
    flow = make(W)
    frame = start_frame(flow, 6, adjoint=False, seed=0, generic=True)
    found = propagate(flow, frame, adjoint=False)
    torch.testing.assert_close(found.growth, by_householder(W, frame), rtol=0, atol=1e-9)
    eye = torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(found.frame[0].mT @ found.frame[0], eye, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [over_depth, over_time])
def test_frames_are_decomposed_as_often_as_their_condition_asks(make):
    counts = []
    for spread in (0.0, 0.1, 3.0):
        flow = make(graded(6, spread))
        counts.append(propagate(flow, start_frame(flow, 6, adjoint=False, seed=0), adjoint=False).decompositions)
    assert counts[0] <= counts[1] < counts[2]
    assert counts[0] <= STEPS // 4
    assert counts[2] >= STEPS // 2


@pytest.mark.parametrize("make", [over_depth, over_time])
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
def test_factors_multiply_to_what_the_product_does_to_the_frame(make, every_step, adjoint):
    W = graded(5, 0.3)
    flow = make(W)
    frame = start_frame(flow, 3, adjoint=adjoint, seed=0)
    factors = []
    end = propagate(flow, frame, adjoint=adjoint, on_factor=factors.append, every_step=every_step).frame
    product = torch.linalg.multi_dot(list(W.flip(0)))
    R = torch.eye(3, dtype=DOUBLE)
    for factor in factors:
        R = factor.R[0] @ torch.diag(factor.scales[0].exp()) @ R
    expected = (product.T if adjoint else product) @ frame[0]
    torch.testing.assert_close(end[0] @ R, expected, rtol=1e-9, atol=0)
    covered = sorted(index for factor in factors for index in factor.steps)
    assert covered == list(range(STEPS))
    assert not every_step or len(factors) == STEPS


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_lengths_may_leave_the_range_of_squares(scale):
    W = graded(5, 0.3)
    small = propagate(over_depth(W), torch.eye(5, dtype=DOUBLE).unsqueeze(0), adjoint=False).growth
    frame = torch.eye(5).unsqueeze(0)
    found = propagate(over_depth(scale * W, torch.float32), frame, adjoint=False).growth
    shift = torch.tensor(scale, dtype=DOUBLE).log()
    torch.testing.assert_close(found - shift, small, rtol=0, atol=1e-4)


def test_volume_is_taken_from_determinants():
    W = graded(4, 0.5)
    for flow in (over_depth(W), over_time(W)):
        frame = start_frame(flow, 4, adjoint=True, seed=0)
        found = propagate(flow, frame, adjoint=True, volume=True)
        assert found.volume is not None
        torch.testing.assert_close(found.volume[:, 0], torch.linalg.slogdet(W).logabsdet, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.volume, found.growth.sum(2), rtol=0, atol=1e-9)
