"""The inequalities of one matrix that the theory rests on, on random matrices."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.jacobians import eigenvalues, from_dense, log_abs_det, non_normality, singular_values
from stabkit.jacobians.numerical_range import numerical_range, support

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


CHAINS = st.builds(
    lambda depth, n, seed, scale: scale * np.random.default_rng(seed).standard_normal((depth, n, n)) / np.sqrt(n),
    st.integers(2, 5),
    st.integers(2, 6),
    st.integers(0, 10**6),
    st.floats(0.3, 2),
)


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


def product(chain):
    return np.linalg.multi_dot(chain[::-1]) if len(chain) > 2 else chain[1] @ chain[0]


@CASES
@given(CHAINS)
def test_log_determinants_frozen_eigenvalues_and_exponents_have_one_sum(chain):
    modes = eigenvalues(chain).values.abs().log().sum().item()
    P = product(chain)
    exponents = singular_values(P).values[0].log() / len(chain)
    np.testing.assert_allclose(log_abs_det(P).value.item(), modes, atol=1e-6)
    np.testing.assert_allclose(log_abs_det(chain).value.sum().item(), modes, atol=1e-6)
    np.testing.assert_allclose(len(chain) * exponents.sum().item(), modes, atol=1e-6)


@CASES
@given(CHAINS, st.integers(0, 100))
def test_a_cotangent_grows_between_the_extreme_exponents(chain, seed):
    P = product(chain)
    g = np.random.default_rng(seed).standard_normal(len(P))
    growth = np.log(np.linalg.norm(P.T @ g) / np.linalg.norm(g)) / len(chain)
    exponents = singular_values(P).values[0].log().numpy() / len(chain)
    assert exponents[-1] - 1e-9 <= growth <= exponents[0] + 1e-9
    assert exponents[0] <= singular_values(chain, 1).values.log().mean().item() + 1e-9


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


A_STABLE = {
    "backward Euler": ([1], [1, -1]),
    "implicit midpoint": ([1, 1 / 2], [1, -1 / 2]),
    "Radau IIA of order 3": ([1, 1 / 3], [1, -2 / 3, 1 / 6]),
    "Gauss of order 4": ([1, 1 / 2, 1 / 12], [1, -1 / 2, 1 / 12]),
}


def polynomial(coefficients, A):
    return sum(c * np.linalg.matrix_power(A, i) for i, c in enumerate(coefficients))


@pytest.mark.parametrize("method", A_STABLE)
@CASES
@given(MATRICES, st.floats(0.01, 10))
def test_von_neumann_an_a_stable_step_of_a_dissipative_field_does_not_grow(method, A, h):
    above, below = A_STABLE[method]
    A = A - quick(A).numerical_abscissa.item() * np.eye(len(A))
    step = np.linalg.solve(polynomial(below, h * A), polynomial(above, h * A))
    assert norm(step) <= SLACK


def test_von_neumann_fails_without_a_stability():
    rotation = np.array([[0.0, -1.0], [1.0, 0.0]])
    assert abs(quick(rotation).numerical_abscissa.item()) < 1e-14
    assert norm(np.eye(2) + 0.5 * rotation) > 1.1


@CASES
@given(MATRICES, st.floats(0.05, 2))
def test_numerical_range_in_eulers_disc_is_numerical_radius_at_most_one(A, h):
    # the disc |1 + z| <= 1 holds h W(A) just where its support function is below that of the disc, 1 - cos(theta)
    angles = np.linspace(-np.pi, np.pi, 181)
    excess = max(h * support(A, theta)[0] - (1 - np.cos(theta)) for theta in angles)
    radius = quick(np.eye(len(A)) + h * A).numerical_radius.item()
    assert abs(radius - 1 - excess) < 1e-3 * (1 + h * norm(A))


@CASES
@given(MATRICES)
def test_berger_powers_stay_below_two_when_the_numerical_radius_is_one(A):
    J = A / quick(A).numerical_radius.item()
    assert quick(J).max_power_norm.item() <= 2 * (1 + 1e-6)
    power = J
    for _ in range(5):  # the power inequality: r(J^k) <= r(J)^k
        power = power @ J
        assert numerical_range(power, angles=16)[1] <= 1 + 1e-6


def outer_boundary(A, angles=128, between=8):
    """Points on a polygon around the numerical range: the tangents of neighbouring directions meet at its corners."""
    theta = 2 * np.pi * np.arange(angles) / angles
    heights = np.array([support(A, -t)[0] for t in theta])
    normals = np.exp(1j * theta)
    delta = 2 * np.pi / angles
    corners = normals * (heights + 1j * (np.roll(heights, -1) - heights * np.cos(delta)) / np.sin(delta))
    weights = np.arange(between) / between
    return (corners[:, None] * (1 - weights) + np.roll(corners, -1)[:, None] * weights).ravel()


@CASES
@given(MATRICES, st.floats(0.05, 1))
def test_crouzeix_palencia_a_method_stable_on_the_numerical_range_stays_bounded(A, shift):
    rk4 = [1, 1, 1 / 2, 1 / 6, 1 / 24]
    A = A - (quick(A).numerical_abscissa.item() + shift) * np.eye(len(A))
    boundary, h = outer_boundary(A), 1.0
    while np.abs(np.polyval(rk4[::-1], h * boundary)).max() > 1:
        h *= 0.8
    result = quick(polynomial(rk4, h * A))
    assert result.max_power_norm.item() <= (1 + np.sqrt(2)) * SLACK


@CASES
@given(MATRICES, st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_crouzeix_palencia_any_polynomial_is_bounded_by_its_values_on_the_numerical_range(A, coefficients):
    highest = np.abs(np.polyval(coefficients[::-1], outer_boundary(A))).max()
    assert norm(polynomial(coefficients, A)) <= (1 + np.sqrt(2)) * highest * SLACK + 1e-12


@CASES
@given(MATRICES)
def test_kreiss_constant_brackets_power_growth(A):
    J = 0.95 * A / max(quick(A).spectral_radius.item(), 1e-6)
    result = non_normality(J, epsilons=(), angles=16, max_power=2000)
    K, growth = result.kreiss.item(), result.max_power_norm.item()
    assert growth * (1 + 1e-6) >= K
    assert growth <= np.e * len(J) * K * (1 + 1e-6)


@CASES
@given(st.integers(3, 12), st.integers(0, 10**6), st.sampled_from([0.0, 1e-5, 0.3]))
def test_layer_norm_annihilates_the_mean_and_nearly_the_radius(d, seed, eps):
    x = torch.as_tensor(np.random.default_rng(seed).standard_normal(d))
    J = torch.autograd.functional.jacobian(lambda v: torch.nn.functional.layer_norm(v, (d,), eps=eps), x)
    variance = x.var(correction=0).item()
    values = np.sort(eigenvalues(J).values[0].real.numpy())
    radial = eps / (variance + eps) ** 1.5
    np.testing.assert_allclose(values[:2], [0, radial], atol=1e-7)
    np.testing.assert_allclose(values[2:] * np.sqrt(variance + eps), 1, rtol=1e-7)
    operator = from_dense(J)
    assert operator.matvec(torch.ones(1, d, dtype=x.dtype)).abs().max() < 1e-9
    centred = (x - x.mean())[None]
    torch.testing.assert_close(operator.matvec(centred), radial * centred, atol=1e-9, rtol=1e-6)


@CASES
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_rms_norm_annihilates_only_the_radius(d, seed):
    x = torch.as_tensor(np.random.default_rng(seed).standard_normal(d))
    J = torch.autograd.functional.jacobian(lambda v: torch.nn.functional.rms_norm(v, (d,), eps=0.0), x)
    values = singular_values(J).values[0].numpy() * x.square().mean().sqrt().item()
    np.testing.assert_allclose(values, np.append(np.ones(d - 1), 0), atol=1e-7)
    assert from_dense(J).matvec(x[None]).abs().max() < 1e-9


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


def vinograd(t):
    c, s = np.cos(6 * t), np.sin(6 * t)
    return np.array(
        [[-1 - 9 * c * c + 12 * s * c, 12 * c * c + 9 * s * c], [-12 * s * s + 9 * s * c, -1 - 9 * s * s - 12 * s * c]]
    )


def test_vinograd_every_frozen_step_decays_and_the_product_grows():
    h, steps = 1e-3, 3000
    chain = np.array([np.eye(2) + h * vinograd(h * i) for i in range(steps)])
    frozen = eigenvalues(chain[::100]).values.real.numpy()
    np.testing.assert_allclose(frozen, np.tile([1 - h, 1 - 10 * h], (30, 1)), atol=1e-10)
    P = np.eye(2)
    for J in chain:
        P = J @ P
    assert abs(np.log(norm(P)) - 6.048) < 5e-4


def test_trefethen_embree_pair_one_abscissa_two_transients():
    calm, wild = np.array([[-1.0, 1.0], [0.0, -1.0]]), np.array([[-1.0, 5.0], [0.0, -2.0]])
    times = np.linspace(0, 3, 3001)
    for A, mu in ((calm, -0.5), (wild, (-3 + np.sqrt(26)) / 2)):
        result = quick(A)
        assert abs(result.numerical_abscissa.item() - mu) < 1e-12
        assert abs(result.spectral_abscissa.item() + 1) < 1e-7
    flow = scipy.linalg.expm(times[:, None, None] * np.stack([calm, wild])[:, None])
    heights = singular_values(torch.as_tensor(flow.reshape(-1, 2, 2)), 1).values.reshape(2, -1).numpy()
    assert heights[0].argmax() == 0
    assert abs(heights[1].max() - 1.384) < 5e-4
    assert abs(times[heights[1].argmax()] - 0.564) < 2e-3


def test_relu_layers_keep_the_mean_square_and_lose_the_typical_gain():
    n, layers = 32, 20_000
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(layers, n, n, generator=generator) * (2 / n) ** 0.5
    alive = torch.rand(layers, n, 1, generator=generator) < 0.5
    u = torch.nn.functional.normalize(torch.randn(layers, n, generator=generator), dim=1)
    gain = from_dense(weights * alive).matvec(u).double().square().sum(1)
    K = np.arange(1, n + 1)
    odds = scipy.special.comb(n, K) / 2.0**n
    typical = (odds * (np.log(4 / n) + scipy.special.digamma(K / 2))).sum() / 2
    assert abs(typical + 0.0412701040) < 1e-9
    assert abs(2 * typical + 5 / (2 * n)) < 0.006
    assert abs(gain.mean() - 1) < 4 * gain.std() / layers**0.5
    logs = gain.log() / 2
    assert abs(logs.mean() - typical) < 4 * logs.std() / layers**0.5
    assert logs.mean() < gain.mean().log() / 2  # Jensen
