import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.operators import Jacobian, compose, from_dense
from stabkit.tracing import trace

SIZES = st.integers(1, 6)


def matrices(batch, m, n, seed=0, dtype=torch.float64):
    return torch.randn(batch, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([torch.float32, torch.float64]))
def test_products_equal_the_dense_ones(batch, m, n, k, dtype):
    A, V, U = matrices(batch, m, n, 1, dtype), matrices(batch, n, k, 2, dtype), matrices(batch, m, k, 3, dtype)
    J = from_dense(A)
    assert torch.equal(J @ V, torch.bmm(A, V))
    torch.testing.assert_close(J.T @ U, torch.einsum("bmn,bmk->bnk", A, U))
    torch.testing.assert_close(J.matvec(V[:, :, 0]), torch.einsum("bmn,bn->bm", A, V[:, :, 0]))
    torch.testing.assert_close(J.T @ U[:, :, 0], J.rmatvec(U[:, :, 0]))


@settings(deadline=None, max_examples=30)
@given(SIZES, st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_dense_gives_the_matrix_back_for_every_chunk(batch, m, n, chunk):
    A = matrices(batch, m, n)
    assert torch.equal(from_dense(A).dense(chunk), A)
    assert torch.equal(from_dense(A).T.dense(chunk), A.transpose(1, 2))


def test_composition_is_the_matrix_product():
    A, B = matrices(2, 3, 4, 1), matrices(2, 4, 5, 2)
    J = from_dense(A) @ from_dense(B)
    assert J.shape == (2, 3, 5)
    torch.testing.assert_close(J.dense(), A @ B)
    torch.testing.assert_close(J.T.dense(), (A @ B).transpose(1, 2))


def test_composition_needs_matching_sizes_and_batches():
    with pytest.raises(ValueError, match="do not chain"):
        compose(from_dense(matrices(2, 3, 4)), from_dense(matrices(2, 3, 4)))
    with pytest.raises(ValueError, match="do not chain"):
        compose(from_dense(matrices(2, 3, 3)), from_dense(matrices(1, 3, 3)))


def test_scipy_operator_is_one_sample():
    A = matrices(3, 4, 5)
    operator = from_dense(A).to_scipy(sample=1)
    v, u = np.arange(5.0), np.arange(4.0)
    np.testing.assert_allclose(operator @ v, A[1].numpy() @ v)
    np.testing.assert_allclose(operator.rmatvec(u), A[1].numpy().T @ u)
    np.testing.assert_allclose(operator @ np.eye(5), A[1].numpy())
    with pytest.raises(IndexError, match="3 samples"):
        from_dense(A).to_scipy(sample=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scipy_gets_an_operator_of_a_precision_that_its_solvers_take(dtype):
    A = matrices(1, 20, 20, dtype=dtype)
    operator = from_dense(A).to_scipy()
    assert operator.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    values = scipy.sparse.linalg.svds(operator, k=2, random_state=0, return_singular_vectors=False)
    truth = np.linalg.svd(A[0].double().numpy(), compute_uv=False)[:2]
    np.testing.assert_allclose(np.sort(values)[::-1], truth, rtol=40 * torch.finfo(dtype).eps)


def test_no_vectors_have_no_products():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    J = trace(model, torch.randn(2, 4)).jacobian()
    assert (J @ torch.ones(2, 4, 0)).shape == (2, 3, 0)
    assert (J.T @ torch.ones(2, 3, 0)).shape == (2, 4, 0)


def test_bad_blocks_and_matrices_are_named():
    J = from_dense(matrices(2, 3, 4))
    with pytest.raises(ValueError, match=r"V has shape \(2, 3, 1\)"):
        J.matmat(torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match=r"U has shape \(2, 4, 1\)"):
        J.rmatmat(torch.ones(2, 4, 1))
    with pytest.raises(ValueError, match="expected"):
        from_dense(torch.ones(3))
    with pytest.raises(TypeError, match="floating-point"):
        from_dense(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="J @ str"):
        J @ "text"
    with pytest.raises(TypeError, match=r"J @ ndarray.*to_scipy"):
        J @ np.ones((2, 4, 1))


def test_minus_identity_is_the_branch_of_a_residual_step():
    A = matrices(2, 4, 4)
    eye = torch.eye(4, dtype=torch.float64)
    for J in (from_dense(A), Jacobian((2, 4, 4), lambda V: A @ V, lambda U: A.mT @ U, dtype=A.dtype, device=A.device)):
        branch = J.minus_identity()
        torch.testing.assert_close(branch.dense(), A - eye)
        torch.testing.assert_close(branch.T.dense(), (A - eye).mT)
        torch.testing.assert_close(branch @ A, A @ A - A)
    with pytest.raises(ValueError, match=r"square Jacobian; this one is 3 x 4"):
        from_dense(matrices(1, 3, 4)).minus_identity()


@settings(deadline=None, max_examples=20)
@given(st.data(), SIZES, SIZES, SIZES)
def test_restriction_is_the_block_at_these_rows_and_columns(data, batch, m, n):
    A = matrices(batch, m, n)
    rows = data.draw(st.lists(st.integers(0, m - 1), min_size=1, unique=True))
    columns = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    J = Jacobian((batch, m, n), lambda V: A @ V, lambda U: A.mT @ U, dtype=A.dtype, device=A.device)
    block = A[:, rows][:, :, columns]
    for found in (J.restrict(rows, torch.tensor(columns)), from_dense(A).restrict(rows, columns)):
        torch.testing.assert_close(found.dense(), block)
        torch.testing.assert_close(found.T.dense(), block.mT)
        torch.testing.assert_close(found @ block.mT, block @ block.mT)
    torch.testing.assert_close(J.restrict(slice(1)).dense(), A[:, :1])


def test_structure_survives_composition_and_difference():
    J = from_dense(matrices(1, 4, 4))
    assert compose(J, J).row_shapes == ((4,),)
    flow = trace(torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.Conv1d(3, 2, 3)), torch.randn(2, 2, 8))
    step = flow.jacobian()
    assert (step.row_shapes, step.column_shapes) == (((2, 4),), ((2, 8),))
    assert (step.T.row_shapes, step.T.column_shapes) == (((2, 8),), ((2, 4),))


def test_bad_restrictions_are_named():
    J = from_dense(matrices(1, 3, 4))
    with pytest.raises(IndexError, match=r"rows reaches from 0 to 3; expected 0 to 2"):
        J.restrict(rows=[0, 3])
    with pytest.raises(ValueError, match=r"columns names a coordinate twice"):
        J.restrict(columns=[1, -3])
    with pytest.raises(ValueError, match=r"rows names no coordinate"):
        J.restrict(rows=[])
    with pytest.raises(IndexError, match=r"dtype torch.float32"):
        J.restrict(rows=torch.ones(1))
