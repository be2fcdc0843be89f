from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stabkit
from stabkit.growth import gradient_profile
from tests.attribution.networks import Activated, LinearStep, linear_steps, normal_input

ROUNDING = 1e-13


def attribute_matrix(A: torch.Tensor, a: float = 1.0, batch: int = 2) -> stabkit.attribution.Attribution:
    """Two steps x' = a x + A x."""
    flow = stabkit.trace(linear_steps(A, A, a=a), normal_input(batch, len(A)))
    return stabkit.attribute(flow)


def test_a_diagonal_step_is_all_spectral():
    found = attribute_matrix(torch.diag(torch.tensor([0.5, -0.5, -1.5])))
    assert found.spectral[0, 0].item() == pytest.approx(0.5 * math.log((1.5**2 + 0.5**2 + 0.5**2) / 3), abs=ROUNDING)
    assert found.non_normal.abs().max() < ROUNDING


def test_an_orthogonal_step_has_no_growth_of_any_kind():
    Q = torch.linalg.qr(normal_input(6, 6))[0]
    found = attribute_matrix(Q, a=0.0)
    for term in (found.growth, found.spectral, found.non_normal, found.alignment, found.branch):
        assert term.abs().max() < ROUNDING


def test_a_normal_step_has_no_non_normal_growth():
    W = normal_input(8, 8)
    found = attribute_matrix(0.3 * (W - W.T))
    assert found.non_normal.abs().max() < ROUNDING
    expected = 0.5 * torch.log(1 + (0.3 * (W - W.T)).square().sum() / 8)
    torch.testing.assert_close(found.spectral[0, 0], expected, rtol=0, atol=ROUNDING)


def test_a_jordan_block_grows_beyond_its_spectrum():
    n, k = 4, 3.0
    found = attribute_matrix(-0.5 * torch.eye(n) + k * torch.diag(torch.ones(n - 1), 1))
    assert found.spectral[0, 0].item() == pytest.approx(math.log(0.5), abs=1e-12)
    assert found.frozen[0, 0].item() == pytest.approx(math.log(0.5), abs=1e-12)
    assert found.volume[0, 0].item() == pytest.approx(math.log(0.5), abs=1e-12)
    assert found.non_normal[0, 0].item() == pytest.approx(0.5 * math.log(1 + k**2 * (n - 1) / (n * 0.25)), abs=1e-12)


def test_a_padded_dense_layer_grows_by_its_non_normality_alone():
    H = normal_input(3, 4)
    padded = torch.zeros(7, 7, dtype=torch.float64)
    padded[4:, :4] = H
    found = attribute_matrix(padded)
    assert found.spectral.abs().max() == 0
    assert found.frozen.abs().max() == 0
    expected = 0.5 * math.log(1 + float(H.square().sum()) / 7)
    assert found.non_normal[0, 0].item() == pytest.approx(expected, abs=ROUNDING)


def test_a_concatenation_is_read_in_the_padded_space():
    class Dense(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.branch = torch.nn.Linear(size, 3, dtype=torch.float64)

        def forward(self, s: torch.Tensor) -> torch.Tensor:
            return torch.cat([s, self.branch(s)], dim=1)

    model = torch.nn.Sequential(Dense(4), Dense(7))
    found = stabkit.attribute(stabkit.trace(model, normal_input(2, 4)))
    for index, size in enumerate((7, 10)):
        expected = 0.5 * math.log(1 + float(model[index].branch.weight.detach().square().sum()) / size)
        assert found.non_normal[index, 0].item() == pytest.approx(expected, abs=ROUNDING)
    assert found.spectral.abs().max() == 0
    assert bool((found.transition < 0).all())
    total = found.spectral + found.non_normal + found.alignment + found.transition
    torch.testing.assert_close(total, found.growth, rtol=0, atol=ROUNDING)


@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(2, 8),
    depth=st.integers(1, 3),
    scale=st.floats(-3, 3),
    a=st.sampled_from([0.0, 0.5, 1.0, -1.2]),
    kind=st.sampled_from(["dense", "triangular", "rank one"]),
    seed=st.integers(0, 1000),
)
def test_the_terms_add_up_to_the_growth(size, depth, scale, a, kind, seed):
    drawn = [10**scale * normal_input(size, size, seed + i) for i in range(depth)]
    shape = {"dense": lambda A: A, "triangular": torch.tril, "rank one": lambda A: A[:, :1] @ A[:1]}
    flow = stabkit.trace(linear_steps(*map(shape[kind], drawn), a=a), normal_input(2, size, seed))
    found = stabkit.attribute(flow, seed=seed)
    profile = gradient_profile(flow, seed=seed, probes=4)
    torch.testing.assert_close(found.growth, profile.log_growth, rtol=1e-12, atol=1e-12)
    total = found.spectral + found.non_normal + found.alignment
    torch.testing.assert_close(total, found.growth, rtol=0, atol=1e-11)
    assert bool((found.non_normal >= 0).all())
    assert found.closing_error.abs().max() < 1e-9  # the matrix against the chain, not a difference of the terms
    split = found.mask + found.norm + found.skip + found.dissipation + found.branch
    torch.testing.assert_close(split, found.isotropic, rtol=0, atol=1e-9)


@pytest.mark.parametrize("a", [1.0, 0.7])
def test_skip_dissipation_and_branch_have_their_signs(a):
    damped = attribute_matrix(-0.1 * torch.eye(5), a=a)
    assert damped.skip[0, 0].item() == pytest.approx(math.log(a), abs=ROUNDING)
    assert damped.dissipation[0, 0] < 0 < damped.branch[0, 0]
    skew = torch.tensor([[0.0, 0.4], [-0.4, 0.0]])
    turned = attribute_matrix(skew, a=a)
    assert turned.dissipation.abs().max() < ROUNDING
    expected = 0.5 * math.log(1 + 0.16 / a**2)
    assert turned.branch[0, 0].item() == pytest.approx(expected, abs=1e-7)  # 0.4 is a float32


def test_a_relu_behind_the_addition_takes_the_log_of_its_active_fraction():
    model = torch.nn.Sequential(Activated(LinearStep(torch.zeros(8, 8).double()), torch.nn.ReLU()))
    x = torch.tensor([[1.0, -1, 1, -1, 1, -1, -1, -1]], dtype=torch.float64)
    found = stabkit.attribute(stabkit.trace(model, x, depth=[""]))
    assert found.mask[0, 0].item() == pytest.approx(0.5 * math.log(3 / 8), abs=ROUNDING)
    assert found.isotropic[0, 0].item() == pytest.approx(0.5 * math.log(3 / 8), abs=ROUNDING)


def test_scaling_the_loss_changes_nothing():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(4)])
    flow = stabkit.trace(model.double(), normal_input(3, 6))
    found = [stabkit.attribute(flow, lambda out, c=c: c * out.square().sum()) for c in (1e-6, 1.0, 1e6)]
    for column in ("growth", "spectral", "non_normal", "alignment", "mask", "branch"):
        for other in (found[0], found[2]):
            torch.testing.assert_close(getattr(other, column), getattr(found[1], column), rtol=0, atol=1e-12)
    assert found[0].mechanisms == found[1].mechanisms == found[2].mechanisms
