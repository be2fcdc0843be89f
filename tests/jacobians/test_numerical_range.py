"""The outline for pictures against the exact boundary."""

from __future__ import annotations

import numpy as np
import pytest

from stabkit.jacobians.numerical_range import numerical_range, outline

N = 90  # beyond this module's limit for exact eigenvalues
RANDOM = np.random.default_rng(0).normal(size=(N, N)) / np.sqrt(N)
MATRICES = {
    "random": RANDOM,
    "identity": np.eye(N),
    "zero": np.zeros((N, N)),
    "jordan": np.eye(N, k=1),
    "symmetric": RANDOM + RANDOM.T,
    "rotation": np.linalg.qr(RANDOM)[0],
    "antisymmetric": RANDOM - RANDOM.T,
    "one far": np.diag([5.0, *np.zeros(N - 1)]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_an_outline_reaches_as_far_as_the_exact_boundary_in_every_direction(name):
    A = MATRICES[name]
    exact, _ = numerical_range(A, 16)
    drawn = outline(A, 16)
    assert drawn.shape == exact.shape
    for theta in np.linspace(0, np.pi, 9):
        turned = np.exp(-1j * theta)
        reach, most = (turned * drawn).real.max(), (turned * exact).real.max()
        assert most - 0.01 * (1 + abs(most)) <= reach <= most + 1e-9


def test_small_matrices_are_exact():
    A = RANDOM[:5, :5]
    np.testing.assert_allclose(outline(A, 16), numerical_range(A, 16)[0], atol=1e-9)
    assert outline(np.array([[3.0]]), 8) == pytest.approx(3.0)


@pytest.mark.parametrize("n", [2, 8, 40])
def test_an_antisymmetric_matrix_reaches_along_the_imaginary_axis_alone(n):
    A = np.array(RANDOM[:n, :n] - RANDOM[:n, :n].T)
    points, radius = numerical_range(A, 16)
    np.testing.assert_allclose(points.real, 0.0, atol=1e-12)
    assert radius == pytest.approx(np.abs(np.linalg.eigvals(A)).max())
    assert np.abs(outline(A, 16).imag).max() == pytest.approx(radius)
