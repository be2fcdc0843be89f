import numpy as np
import pytest

from stabkit.integrators.spectral_radius import (
    disc_test,
    has_defective_unit_eigenvalue,
    root_radius,
    spectral_radius,
)

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_spectral_radius_against_lapack(r):
    M = RNG.normal(size=(4, 7, r, r)) + 1j * RNG.normal(size=(4, 7, r, r))
    assert np.allclose(spectral_radius(M), np.abs(np.linalg.eigvals(M)).max(axis=-1))
    M[0, 0, 0, 0] = np.inf
    assert spectral_radius(M)[0, 0] == np.inf


@pytest.mark.parametrize("r", [3, 4, 6])
@pytest.mark.parametrize("degree", [1, 3])
def test_roots_of_many_polynomials(r, degree):
    c = RNG.normal(size=(r + 1, degree + 1))
    z = RNG.normal(size=3000) + 1j * RNG.normal(size=3000)
    expected = [np.abs(np.roots((c @ point ** np.arange(degree + 1))[::-1])).max() for point in z]
    assert np.allclose(root_radius(c, z), expected, rtol=1e-9)
    verdict = disc_test(c, z)
    assert np.all((verdict == 0) | ((verdict > 0) == (np.array(expected) < 1)))
    assert np.mean(verdict == 0) < 0.01


def test_points_with_repeated_roots():
    c = np.array([[-1.0, 0], [3, 0], [-3, 0], [1, 0]])  # (zeta - 1)^3, whatever z
    assert np.allclose(root_radius(c, np.linspace(0, 1, 50) + 0j), 1, atol=1e-4)
    assert not disc_test(c, np.zeros(3, dtype=complex)).any()


def test_defective_unit_eigenvalues():
    matrices = np.array(
        [np.eye(3), [[1, 1, 0], [0, 1, 0], [0, 0, 0.5]], np.diag([1, -1, 1j]), [[0.5, 1, 0], [0, 0.5, 0], [0, 0, 1]]]
    ).astype(complex)
    assert has_defective_unit_eigenvalue(matrices, 1e-12).tolist() == [False, True, False, False]
