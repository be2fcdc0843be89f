import json

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.jacobians import Jacobian, eigenvalues, from_dense, singular_values
from tests.jacobians.hard_matrices import operator, orthogonal


def ginibre(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])


@pytest.mark.parametrize("method", ["dense", "krylov-schur"])
@pytest.mark.parametrize(
    ("which", "badness"),
    [
        ("LM", lambda z: -np.abs(z)),
        ("LR", lambda z: -z.real),
        ("SR", lambda z: z.real),
        (1.2, lambda z: np.abs(z - 1.2)),
        (0.3 + 1.1j, lambda z: np.abs(z - 0.3 - 1.1j)),
    ],
)
def test_eigenvalues_of_a_batch_by_every_rule(which, badness, method):
    A = ginibre(2, 80, 80)
    spectrum = eigenvalues(operator(A), 5, which, method=method)
    for values, matrix in zip(spectrum.values.numpy(), A, strict=True):
        truth = scipy.linalg.eigvals(matrix)
        np.testing.assert_allclose(badness(values), np.sort(badness(truth))[:5], atol=1e-8)
    assert bool(spectrum.converged.all())


@pytest.mark.parametrize("shape", [(3, 40, 70), (3, 70, 40)])
@pytest.mark.parametrize("which", ["LM", "SM"])
@pytest.mark.parametrize("method", ["dense", "golub-kahan"])
def test_singular_values_of_a_rectangular_batch(shape, which, method):
    A = ginibre(*shape)
    spectrum = singular_values(operator(A), 4, which, method=method)
    truth = np.array([scipy.linalg.svdvals(a) for a in A])
    np.testing.assert_allclose(spectrum.values, truth[:, :4] if which == "LM" else truth[:, ::-1][:, :4], atol=1e-9)
    assert bool(spectrum.converged.all())


@pytest.mark.parametrize("iterate", [False, True], ids=["dense", "iterative"])
def test_operators_whose_squares_leave_the_range_of_a_float(iterate):
    # a product over depth may have any size, and another one in every sample
    A = ginibre(80, 80)
    sizes = np.array([1e-200, 1.0, 1e200])
    J = operator(sizes[:, None, None] * A)
    sigma = scipy.linalg.svdvals(A)
    for which, truth in (("LM", sigma[:3]), ("SM", sigma[::-1][:3])):
        spectrum = singular_values(J, 3, which, method="golub-kahan" if iterate else "dense")
        np.testing.assert_allclose(spectrum.values.numpy() / sizes[:, None], np.tile(truth, (3, 1)), atol=1e-9)
        assert bool(spectrum.converged.all())
        assert bool((spectrum.error_bounds / spectrum.values.max(1, keepdim=True).values < 1e-6).all())
    values = scipy.linalg.eigvals(A)
    for which, badness in (("LR", lambda z: -z.real), (1e200 * 1.2, lambda z: np.abs(z - 1.2))):
        large = operator(1e200 * A)
        spectrum = eigenvalues(large, 3, which, method="krylov-schur" if iterate else "dense")
        best = np.sort(badness(values))[:3]
        np.testing.assert_allclose(badness(spectrum.values[0].numpy() / 1e200), best, atol=1e-8)
        assert bool(spectrum.converged.all())


def test_all_values_by_default_and_in_order():
    A = ginibre(30, 30)
    values = eigenvalues(A).values[0].numpy()
    np.testing.assert_allclose(np.abs(values), np.sort(np.abs(scipy.linalg.eigvals(A)))[::-1], atol=1e-12)
    np.testing.assert_allclose(singular_values(torch.as_tensor(A)).values[0], scipy.linalg.svdvals(A), atol=1e-12)


def test_a_float32_matrix_is_decomposed_in_float64():
    A = ginibre(50, 50).astype(np.float32)
    spectrum = singular_values(A)
    np.testing.assert_allclose(spectrum.values[0], scipy.linalg.svdvals(A.astype(float)), atol=1e-13)


def test_iteration_on_float32_products_is_good_to_their_rounding():
    A = ginibre(600, 600).astype(np.float32)
    spectrum = singular_values(operator(A, torch.float32), 4)
    assert spectrum.method == "golub-kahan"
    np.testing.assert_allclose(spectrum.values[0], scipy.linalg.svdvals(A.astype(float))[:4], atol=5e-7)


def test_auto_falls_back_to_lapack_where_iteration_cannot_converge():
    spectrum = eigenvalues(operator(orthogonal(np.random.default_rng(0), 780)), 4)
    assert spectrum.method == "dense"
    assert "had not converged after" in spectrum.reason
    assert spectrum.n_products > 780
    assert bool(spectrum.converged.all())
    np.testing.assert_allclose(spectrum.values.abs(), 1, atol=1e-12)


def test_the_result_says_which_way_it_went_and_why():
    A = ginibre(520, 520)
    small, many, few = singular_values(A[:90], 4), singular_values(operator(A), 100), singular_values(operator(A), 2)
    assert "at most 512" in small.reason
    assert "more than 1/6" in many.reason
    assert "iterating is cheaper" in few.reason
    assert (small.method, many.method, few.method) == ("dense", "dense", "golub-kahan")
    assert (small.path, few.path) == ("dense", "products")
    budget = singular_values(operator(A), 100, max_products=300)
    assert "too few for the dense matrix" in budget.reason


def test_all_singular_values_of_float32_products_by_the_gram_matrix_meet_their_bounds():
    rng = np.random.default_rng(0)
    A = (orthogonal(rng, 520) * np.logspace(0, -9, 520)) @ orthogonal(rng, 520)
    rounded = A.astype(np.float32)
    gram = singular_values(operator(rounded, torch.float32))
    truth = scipy.linalg.svdvals(rounded.astype(float))
    assert gram.method == "dense gram"
    assert (np.abs(gram.values[0].numpy() - truth) <= gram.residuals[0].numpy()).all()
    assert float(gram.error_bounds.max()) < 2e-6
    exact = singular_values(operator(A))  # in float64 the tolerance asks for more than the Gram matrix has
    assert exact.method == "dense"
    np.testing.assert_allclose(exact.values[0], np.logspace(0, -9, 520), atol=1e-15)
    assert singular_values(operator(rounded, torch.float32), which="SM").method == "dense"


@pytest.mark.parametrize("budget", [1, 7, 40, 150, 400])
def test_the_budget_is_respected_and_counted(budget):
    A = np.eye(600) + ginibre(600, 600)
    counted = [0]

    def count(f):
        def product(V):
            counted[0] += V.shape[2]
            return f(V)

        return product

    J = operator(A)
    J = Jacobian(J.shape, count(J.matmat), count(J.rmatmat), dtype=J.dtype, device=J.device)
    for compute in (eigenvalues, singular_values):
        counted[0] = 0
        spectrum = compute(J, 3, max_products=budget)
        assert counted[0] == spectrum.n_products <= budget
        assert spectrum.stopped == "budget" or bool(spectrum.converged.all())


def test_an_interrupt_returns_what_has_converged():
    A = np.eye(600) + ginibre(600, 600)
    J, calls = operator(A), [0]

    def interrupted(V):
        calls[0] += 1
        if calls[0] == 60:
            raise KeyboardInterrupt
        return J.matmat(V)

    stopping = Jacobian(J.shape, interrupted, J.rmatmat, dtype=J.dtype, device=J.device)
    spectrum = singular_values(stopping, 40, method="golub-kahan")
    converged = spectrum.converged[0].numpy()
    assert spectrum.stopped == "interrupted"
    assert 0 < converged.sum() < 40
    np.testing.assert_allclose(spectrum.values[0].numpy()[converged], scipy.linalg.svdvals(A)[:40][converged])


def raising_at(J, call):
    """The operator, with a keyboard interrupt in its ``call``-th product (forward and transposed together)."""
    calls = [0]

    def counted(f):
        def product(V):
            calls[0] += 1
            if calls[0] == call:
                raise KeyboardInterrupt
            return f(V)

        return product

    return Jacobian(J.shape, counted(J.matmat), counted(J.rmatmat), dtype=J.dtype, device=J.device)


@pytest.mark.parametrize("call", [1, 2, 20, 60, 90, 120])
def test_an_interrupt_at_any_moment_leaves_only_right_values_marked(call):
    A = np.diag(np.append(1.5 ** -np.arange(40.0), np.zeros(40))) + 1e-3 * ginibre(80, 80)
    J, truth = operator(A), scipy.linalg.eigvals(A)
    spectrum = eigenvalues(raising_at(J, call), 8, method="krylov-schur")
    assert spectrum.stopped in ("interrupted", "done")
    for value in spectrum.values[spectrum.converged].numpy():
        assert np.abs(truth - value).min() < 1e-9
    values = singular_values(raising_at(J, call), 8, method="golub-kahan")
    found = values.converged[0].numpy()
    np.testing.assert_allclose(values.values[0].numpy()[found], scipy.linalg.svdvals(A)[:8][found], atol=1e-9)
    assert call < 60 or found.all()


def test_an_interrupt_while_the_dense_matrix_is_built_marks_everything_unconverged():
    J = raising_at(operator(ginibre(2, 30, 30)), 1)
    for compute in (eigenvalues, singular_values):
        spectrum = compute(raising_at(J, 1), 4)
        assert spectrum.stopped == "interrupted"
        assert not spectrum.converged.any()
        assert bool(spectrum.values.isnan().all())
        assert spectrum.values.shape == (2, 4)


def test_residuals_are_those_of_the_definition():
    A = np.diag([4.0, 3.0, 2.0, 1.0]) + 0.1 * ginibre(4, 4)
    spectrum = eigenvalues(operator(A), 2, method="krylov-schur")
    smallest = [np.linalg.svd(A - z * np.eye(4), compute_uv=False)[-1] for z in spectrum.values[0].numpy()]
    assert (spectrum.residuals[0].numpy() >= np.array(smallest) - 1e-15).all()
    assert float(spectrum.residuals.max()) < 1e-12


def test_condition_numbers_against_scipy():
    A = ginibre(70, 70)
    values, Y, X = scipy.linalg.eig(A, left=True)
    expected = 1 / np.abs((Y.conj() * X).sum(0))
    for method in ("dense", "krylov-schur"):
        spectrum = eigenvalues(operator(A), 4, "LR", method=method)
        nearest = [int(np.abs(values - z).argmin()) for z in spectrum.values[0].numpy()]
        np.testing.assert_allclose(spectrum.condition_numbers[0], expected[nearest], rtol=1e-6)


def test_shuffling_the_batch_shuffles_the_result_and_seeds_are_repeatable():
    A = ginibre(3, 90, 90)
    first = singular_values(operator(A), 3, method="golub-kahan")
    shuffled = singular_values(operator(A[[2, 0, 1]]), 3, method="golub-kahan")
    torch.testing.assert_close(first.values[[2, 0, 1]], shuffled.values, rtol=0, atol=1e-12)
    again = singular_values(operator(A), 3, method="golub-kahan")
    assert torch.equal(first.values, again.values)


def test_the_result_is_ready_for_json():
    spectrum = eigenvalues(np.array([[0.0, -1.0], [1.0, 0.0]]))
    stored = json.loads(json.dumps(spectrum.to_dict()))
    np.testing.assert_allclose(stored["values"], [[[0, 1], [0, -1]]], atol=1e-15)
    assert stored["method"] == "dense"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eigenvalues(np.ones((2, 3))), ValueError, "use singular_values"),
        (lambda: eigenvalues(np.eye(3), k=4), ValueError, "k=4"),
        (lambda: singular_values(np.ones((2, 3)), k=3), ValueError, "k=3"),
        (lambda: singular_values(np.eye(3), k=0), ValueError, "k=0"),
        (lambda: singular_values(np.eye(3), k=1.5), TypeError, "whole number"),
        (lambda: eigenvalues(np.eye(3, dtype=int)), TypeError, "floating-point"),
        (lambda: singular_values(torch.eye(3, dtype=torch.int32)), TypeError, "floating-point"),
        (lambda: eigenvalues(1j * np.eye(3)), TypeError, "real"),
        (lambda: eigenvalues([[1.0]]), TypeError, "list"),
        (lambda: eigenvalues(np.ones(3)), ValueError, "shape"),
        (lambda: eigenvalues(np.full((3, 3), np.nan)), ValueError, "nan or infinite"),
        (lambda: singular_values(operator(np.full((600, 600), np.inf)), k=1), ValueError, "nan or infinite"),
        (lambda: singular_values(np.zeros((0, 3))), ValueError, "at least one"),
        (lambda: eigenvalues(np.eye(3), which="SM"), ValueError, "point 0"),
        (lambda: eigenvalues(np.eye(3), which=complex("nan")), ValueError, "finite"),
        (lambda: singular_values(np.eye(3), which="LR"), ValueError, "'SM'"),
        (lambda: eigenvalues(np.eye(3), tol=0.0), ValueError, "tol"),
        (lambda: eigenvalues(np.eye(3), max_products=0), ValueError, "max_products"),
        (lambda: eigenvalues(np.eye(3), method="dense", max_products=2), ValueError, "needs 3 products"),
        (lambda: eigenvalues(np.eye(3), method="arpack"), ValueError, "krylov-schur"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["gaussian", "identity plus low rank", "clusters", "decaying"]),
    k=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_looser_tolerance_never_takes_more_products(seed, kind, k, dtype):
    rng = np.random.default_rng(seed)
    n = 150
    A = rng.standard_normal((n, n)) / np.sqrt(n)
    if kind == "identity plus low rank":
        A = np.eye(n) + A[:, :3] @ A[:3]
    elif kind != "gaussian":
        values = {
            "clusters": np.repeat([3.0, 2.9, 2.0, 1.0], [3, 2, 4, n - 9]) + 1e-4 * rng.random(n),
            "decaying": 0.9 ** np.arange(n),
        }[kind]
        A = orthogonal(rng, n) @ np.diag(values) @ orthogonal(rng, n)
    J = from_dense(torch.from_numpy(A).to(dtype))
    spent = [
        singular_values(J, k, tol=tol, method="golub-kahan").n_products
        for tol in (3e-1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, None)
    ]
    assert spent == sorted(spent)
