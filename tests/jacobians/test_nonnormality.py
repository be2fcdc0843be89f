import json

import numpy as np
import pytest
import scipy.linalg
import torch

from stabkit.errors import StabkitError
from stabkit.jacobians import Jacobian, eigenvalues, non_normality
from stabkit.jacobians.numerical_range import numerical_range, support
from stabkit.jacobians.pseudospectra import Resolvent
from tests.jacobians.hard_matrices import grcar, operator

JORDAN = np.array([[0.9, 1.0], [0.0, 0.9]])


def test_jordan_block_has_the_published_constants():
    result = non_normality(JORDAN)
    assert result.kreiss.item() == pytest.approx(2.6, abs=1e-6)
    assert result.max_power_norm.item() == pytest.approx(3.91256708, abs=1e-8)
    assert result.max_power_at.item() == 9
    assert result.numerical_radius.item() == pytest.approx(1.4, abs=1e-9)
    assert result.henrici.item() == pytest.approx(1, abs=1e-12)  # the strictly triangular part itself
    assert (result.condition_numbers > 1e7).all()


def test_normal_matrices_have_no_departure_to_the_last_digits():
    Q = scipy.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    symmetric = Q @ np.diag(np.linspace(-1, 1, 40)) @ Q.T
    for A in (Q, symmetric, Q - Q.T, np.eye(3)):
        result = non_normality(A)
        assert result.henrici.item() < 1e-13 * len(A)  # sqrt(||A||_F^2 - sum |lambda|^2) is off by 1e-7 here
        assert result.numerical_radius.item() == pytest.approx(result.spectral_radius.item(), rel=1e-9)
    upper = np.triu(np.random.default_rng(1).standard_normal((40, 40)))
    expected = np.sqrt((upper**2).sum() - (np.diag(upper) ** 2).sum())
    assert non_normality(upper).henrici.item() == pytest.approx(expected, rel=1e-10)


def test_jordan_block_pseudospectra_in_closed_form():
    # sigma_min(z - A) = eps has |z - .9| = sqrt(eps + eps^2) for a 2 x 2 Jordan block with unit coupling
    result = non_normality(JORDAN, epsilons=(1e-2, 1e-5))
    expected = [0.9 + np.sqrt(e + e * e) for e in (1e-2, 1e-5)]
    np.testing.assert_allclose(result.pseudospectral_radius[0], expected, rtol=1e-9)
    np.testing.assert_allclose(result.pseudospectral_abscissa[0], expected, rtol=1e-9)


def test_grcar_matrix_has_the_published_values():
    result = non_normality(grcar(100), epsilons=(1e-4,), max_power=3)
    assert result.pseudospectral_radius.item() == pytest.approx(2.85216, abs=5e-6)
    assert result.norm.item() == pytest.approx(3.2393550371, abs=1e-9)
    assert result.numerical_abscissa.item() == pytest.approx(2.9938816993, abs=1e-9)
    assert result.kreiss.item() == np.inf


@pytest.mark.parametrize(("k", "power", "kreiss"), [(5, 2.55, 1.15), (20, 10.01, 3.51), (50, 25.0, 8.61)])
def test_transient_growth_at_spectral_radius_one_half(k, power, kreiss):
    result = non_normality(np.eye(2) + 0.5 * np.array([[-1, k], [0, -2]]))
    assert result.spectral_radius.item() == pytest.approx(0.5)
    assert result.max_power_norm.item() == pytest.approx(power, abs=0.006)
    assert result.kreiss.item() == pytest.approx(kreiss, abs=0.006)


def test_normal_matrices_show_no_non_normality():
    rotation = scipy.linalg.block_diag([[0.6, -0.7], [0.7, 0.6]], [0.99], [-0.3])
    result = non_normality(np.stack([rotation, np.eye(4), np.zeros((4, 4))]), epsilons=(1e-3, 1e-7))
    radius = np.array([0.99, 1.0, 0.0])
    np.testing.assert_allclose(result.henrici, 0, atol=1e-7)
    np.testing.assert_allclose(result.norm, radius, atol=1e-12)
    np.testing.assert_allclose(result.numerical_radius, radius, atol=1e-12)
    np.testing.assert_allclose(result.kreiss, 1, atol=1e-8)
    np.testing.assert_allclose(result.pseudospectral_radius, radius[:, None] + [1e-3, 1e-7], rtol=1e-8)
    np.testing.assert_allclose(result.condition_numbers, 1, rtol=1e-12)


def test_numerical_range_of_a_jordan_block_is_a_disc():
    points, radius = numerical_range(JORDAN, 32)
    np.testing.assert_allclose(np.abs(points - 0.9), 0.5, rtol=1e-12)
    assert len(points) == 32
    assert radius == pytest.approx(1.4, abs=1e-12)
    assert support(JORDAN, 0.3)[0] == pytest.approx(0.9 * np.cos(0.3) + 0.5)


def test_resolvent_norms_by_inverse_iteration_equal_the_svd():
    A = np.random.default_rng(0).standard_normal((90, 90)) / 10
    resolvent = Resolvent(A)
    for z in (1.3, 0.4 + 0.9j, -2.0j):
        expected = np.linalg.svd(z * np.eye(90) - A, compute_uv=False)[-1]
        assert resolvent.smallest(z) == pytest.approx(expected, rel=1e-6)


def test_projection_gives_lower_bounds():
    A = np.triu(np.random.default_rng(0).standard_normal((60, 60)), -1) / 7
    exact = non_normality(A, epsilons=(1e-1,), method="dense", max_power=20)
    bound = non_normality(operator(A), epsilons=(1e-1,), method="arnoldi", size=25, max_power=20)
    assert exact.lower_bounds == ("kreiss",)
    assert len(bound.lower_bounds) == 5
    for name in bound.lower_bounds:
        low, high = getattr(bound, name).item(), getattr(exact, name).item()
        assert np.isnan(low) or low <= high * (1 + 1e-9), name
    assert bound.norm.item() == pytest.approx(exact.norm.item(), rel=1e-8)
    assert bound.numerical_abscissa.item() == pytest.approx(exact.numerical_abscissa.item(), rel=1e-8)
    assert bound.pseudospectral_radius.item() > 0.5 * exact.pseudospectral_radius.item()


def test_condition_numbers_of_grcar_say_that_its_eigenvalues_are_lost():
    spectrum = eigenvalues(grcar(400), 5)
    assert not spectrum.converged.any()
    assert (spectrum.error_bounds > 0.1).all()


def test_the_result_is_ready_for_json_and_bad_input_is_named():
    assert json.loads(json.dumps(non_normality(JORDAN).to_dict()))["method"] == "dense"
    with pytest.raises(ValueError, match="square"):
        non_normality(np.ones((2, 3)))
    with pytest.raises(ValueError, match="epsilons"):
        non_normality(JORDAN, epsilons=(0.0,))
    with pytest.raises(ValueError, match="angles=2"):
        non_normality(JORDAN, angles=2)
    with pytest.raises(ValueError, match="arnoldi"):
        non_normality(JORDAN, method="krylov")


def test_large_operators_spend_what_they_may_and_refuse_the_rest():
    # a shift with noise: its largest eigenvalues lie on a circle, where no iteration tells them apart
    n, rng = 3000, np.random.default_rng(0)
    weights = torch.from_numpy(1 + 0.01 * rng.standard_normal(n))[None, :, None]
    J = Jacobian(
        (1, n, n),
        lambda V: weights * V.roll(1, 1),
        lambda U: (weights * U).roll(-1, 1),
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    result = non_normality(J, size=20, max_products=200)
    assert result.n_products <= 220
    assert bool(result.spectral_radius.isnan())
    assert 0.9 < result.norm.item() <= weights.max().item()
    with pytest.raises(StabkitError, match=r"method='dense' takes about 100 n\^3 = 3e\+12 .* use method='arnoldi'"):
        non_normality(J, method="dense")
    with pytest.raises(StabkitError, match="max_products=3; expected at least 100"):
        non_normality(J, max_products=3)
