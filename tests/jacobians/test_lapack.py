import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.jacobians.lapack import dense_eigenvalues, dense_singular_values

EPS = np.finfo(float).eps


def matched(values, truth):
    distances = np.abs(values[:, None] - truth[None, :])
    rows, columns = scipy.optimize.linear_sum_assignment(distances)
    return distances[rows, columns]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(0, 3))
def test_error_bounds_hold_for_integer_similarities(n, seed, coupling):
    # a unimodular integer similarity keeps integer eigenvalues exactly, defective ones included
    rng = np.random.default_rng(seed)
    truth = rng.integers(-2, 3, n).astype(float)
    T = np.diag(truth) + np.triu(np.round(coupling * rng.standard_normal((n, n))), 1)
    X, inverse = np.eye(n), np.eye(n)
    for _ in range(3):
        i, j = rng.choice(n, 2, replace=False)
        step = np.eye(n)
        step[i, j] = 1
        back = np.eye(n)
        back[i, j] = -1
        X, inverse = step @ X, inverse @ back
    found = dense_eigenvalues(X @ T @ inverse, EPS)
    assert (matched(found.values, truth) <= found.error_bounds + 1e-15).all()


def test_a_permuted_triangular_matrix_is_recognised():
    rng = np.random.default_rng(0)
    T = np.triu(rng.standard_normal((40, 40)), 1) + np.diag(np.repeat([1.0, 0.5], 20))
    order = rng.permutation(40)
    found = dense_eigenvalues(T[np.ix_(order, order)], EPS)
    np.testing.assert_array_equal(np.sort(found.values.real), np.sort(T.diagonal()))
    assert (found.error_bounds <= 2 * EPS * found.norm).all()


def test_a_symmetric_block_is_perfectly_conditioned():
    S = np.random.default_rng(0).standard_normal((20, 20))
    found = dense_eigenvalues(S + S.T, EPS)
    np.testing.assert_array_equal(found.condition_numbers, 1)
    np.testing.assert_allclose(np.sort(found.values.real), np.linalg.eigvalsh(S + S.T), atol=1e-13)


@pytest.mark.parametrize("rounding", [EPS, 1e-7])
def test_singular_value_bounds_include_the_rounding_of_the_entries(rounding):
    A = np.random.default_rng(0).standard_normal((30, 20))
    noisy = A * (1 + rounding * np.random.default_rng(1).uniform(-1, 1, A.shape) / np.sqrt(20))
    values, residuals, bounds = dense_singular_values(noisy, rounding)
    assert (np.abs(values - scipy.linalg.svdvals(A)) <= bounds).all()
    assert (residuals < 1e-13).all()
