"""The inequalities of one matrix that the theory rests on, on random matrices."""

import numpy as np
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.jacobians import eigenvalues, log_abs_det, non_normality, singular_values

SLACK = 1 + 1e-9
MATRICES = st.builds(
    lambda n, seed, scale, skew: (
        scale
        * (
            skew * np.triu(np.random.default_rng(seed).standard_normal((n, n)), 1)
            + np.random.default_rng(seed + 1).standard_normal((n, n)) / np.sqrt(n)
        )
    ),
    st.integers(2, 8),
    st.integers(0, 10**6),
    st.floats(0.05, 2),
    st.floats(0, 3),
)
CASES = settings(deadline=None, max_examples=15)


def norm(A):
    return float(singular_values(A, 1).values[0, 0])


def quick(A):
    return non_normality(A, epsilons=(), angles=16, max_power=60)


@CASES
@given(MATRICES)
def test_spectral_radius_numerical_radius_norm(A):
    result = quick(A)
    rho, r = result.spectral_radius.item(), result.numerical_radius.item()
    assert rho <= r * SLACK
    assert r <= norm(A) * SLACK
    assert norm(A) <= 2 * r * SLACK


@CASES
@given(MATRICES)
def test_schur_and_weyl(A):
    moduli = eigenvalues(A).values[0].abs().numpy()
    sigma = singular_values(A).values[0].numpy()
    assert (moduli**2).sum() <= (A**2).sum() * SLACK
    assert (np.cumprod(moduli) <= np.cumprod(sigma) * SLACK + 1e-12).all()
    np.testing.assert_allclose(moduli.prod(), sigma.prod(), rtol=1e-6, atol=1e-12)


@CASES
@given(MATRICES, MATRICES)
def test_determinants_of_products_add_up(A, B):
    n = min(len(A), len(B))
    P, Q = torch.as_tensor(A[:n, :n].copy()), torch.as_tensor(B[:n, :n].copy())
    total = log_abs_det(P @ Q).value.item()
    modes = eigenvalues(P).values.abs().log().sum() + eigenvalues(Q).values.abs().log().sum()
    np.testing.assert_allclose(total, modes.item(), atol=1e-5)


@CASES
@given(MATRICES, st.integers(0, 100))
def test_a_cotangent_grows_between_the_extreme_singular_values(A, seed):
    g = np.random.default_rng(seed).standard_normal(len(A))
    ratio = np.linalg.norm(A.T @ g) / np.linalg.norm(g)
    assert float(singular_values(A, 1, "SM").values[0, 0]) <= ratio * SLACK + 1e-14
    assert ratio <= norm(A) * SLACK


@CASES
@given(MATRICES, st.floats(0.01, 1))
def test_logarithmic_norm_bounds_flow_and_euler_step(A, h):
    mu, eye = quick(A).numerical_abscissa.item(), np.eye(len(A))
    assert norm(scipy.linalg.expm(h * A)) <= np.exp(h * mu) * SLACK
    assert 1 + h * mu <= norm(eye + h * A) * SLACK
    assert norm(eye + h * A) <= np.sqrt(1 + 2 * h * mu + (h * norm(A)) ** 2) * SLACK
    lowest = -quick(-A).numerical_abscissa.item()
    assert float(singular_values(eye + h * A, 1, "SM").values[0, 0]) >= 1 + h * lowest - 1e-9


@CASES
@given(MATRICES, st.floats(0.05, 1))
def test_a_contracting_euler_step_is_a_cocoercive_field(A, h):
    step = np.eye(len(A)) + h * A
    form = quick((A + A.T) / 2 + (h / 2) * A.T @ A).numerical_abscissa.item()  # max of x^T A x + (h/2) |A x|^2
    assert (norm(step) <= 1) == (form <= 0) or abs(form) < 1e-9


@CASES
@given(MATRICES)
def test_berger_powers_stay_below_two_when_the_numerical_radius_is_one(A):
    J = A / quick(A).numerical_radius.item()
    assert quick(J).max_power_norm.item() <= 2 * (1 + 1e-6)


@CASES
@given(MATRICES)
def test_kreiss_constant_brackets_power_growth(A):
    J = 0.95 * A / max(quick(A).spectral_radius.item(), 1e-6)
    result = non_normality(J, epsilons=(), angles=16, max_power=2000)
    K, growth = result.kreiss.item(), result.max_power_norm.item()
    assert growth * (1 + 1e-6) >= K
    assert growth <= np.e * len(J) * K * (1 + 1e-6)


@CASES
@given(st.integers(3, 12), st.integers(0, 10**6))
def test_layer_norm_annihilates_two_directions_and_scales_the_rest(d, seed):
    x = torch.as_tensor(np.random.default_rng(seed).standard_normal(d))
    J = torch.autograd.functional.jacobian(lambda v: torch.nn.functional.layer_norm(v, (d,), eps=0.0), x)
    values = singular_values(J).values[0].numpy()
    np.testing.assert_allclose(values[:-2] * x.std(correction=0).item(), 1, rtol=1e-7)
    np.testing.assert_allclose(values[-2:], 0, atol=1e-7)


@CASES
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0.01, 2))
def test_euler_on_a_skew_field_grows_by_the_known_factor(pairs, seed, h):
    S = np.random.default_rng(seed).standard_normal((2 * pairs, 2 * pairs))
    y = np.abs(scipy.linalg.eigvals(S - S.T).imag)
    moduli = eigenvalues(np.eye(2 * pairs) + h * (S - S.T)).values[0].abs().numpy()
    np.testing.assert_allclose(np.sort(moduli), np.sort(np.hypot(1, h * y)), rtol=1e-9)


def test_products_can_grow_where_no_factor_has_an_eigenvalue():
    A = np.array([[0.0, 2.0], [0.0, 0.0]])
    assert eigenvalues(A).values.abs().max() == 0
    assert eigenvalues(A.T @ A).values.abs().max().item() == 4
