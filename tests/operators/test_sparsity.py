from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.operators import Jacobian, from_dense
from stabkit.operators.compression import count_entries, row_groups
from stabkit.operators.sparsity import Pattern, find_pattern, full_pattern


def held(pattern: Pattern, m: int, n: int) -> np.ndarray:
    """The entries that a pattern holds, as a boolean matrix."""
    found = np.zeros((m, n), dtype=bool)
    for groups in row_groups(pattern):
        for free in groups.free_rows:
            found[free + groups.site_rows[groups.entry_sites], groups.entry_columns] = True
    assert found.sum() == count_entries(pattern)
    return found


def on_axes(A: torch.Tensor, row_shapes, column_shapes) -> Jacobian:
    return Jacobian(
        tuple(A.shape),
        lambda V: A @ V,
        lambda U: A.mT @ U,
        dtype=A.dtype,
        device=A.device,
        row_shapes=row_shapes,
        column_shapes=column_shapes,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 16), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_the_pattern_of_a_short_axis_misses_no_entry(m, n, density, seed):
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(m, n, generator=generator) < density
    A = (torch.randn(1, m, n, generator=generator) * some).double()
    assert not (A[0].numpy() != 0)[~held(find_pattern(from_dense(A)), m, n)].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(17, 90), st.integers(1, 90), st.integers(0, 3), st.floats(0, 1), st.integers(0, 1000))
def test_whatever_the_pattern_the_matrix_is_right(m, n, band, density, seed):
    generator = torch.Generator().manual_seed(seed)
    near = (torch.arange(m)[:, None] * n - torch.arange(n) * m).abs() <= band * max(m, n)
    some = torch.rand(m, n, generator=generator) < density / 10
    A = (torch.randn(1, m, n, generator=generator) * (near | some)).double()
    (found,) = on_axes(A, ((m,),), ((n,),)).sparse()
    np.testing.assert_allclose(found.toarray(), A[0].numpy(), rtol=1e-12, atol=1e-14)


def test_local_patterns_are_found_exactly_from_few_probes():
    size = 400
    A = torch.randn(1, size, size, dtype=torch.float64).tril(2).triu(-2)
    pattern = find_pattern(from_dense(A))
    assert np.array_equal(held(pattern, size, size), A[0].numpy() != 0)
    assert pattern.n_products < 30


def test_what_is_not_where_it_was_expected_refutes_the_windows():
    size = 400
    A = torch.eye(size, dtype=torch.float64)
    A[37, 310] = 1  # neither the middle nor an end shows it
    pattern = find_pattern(from_dense(A))
    assert held(pattern, size, size)[37, 310]


def test_axes_are_told_apart():
    channels, pixels = torch.randn(3, 3), torch.randn(8, 8).tril()
    A = torch.kron(channels, pixels).unsqueeze(0).double()
    pattern = find_pattern(on_axes(A, ((3, 8),), ((3, 8),)))
    assert np.array_equal(held(pattern, 24, 24), A[0].numpy() != 0)
    assert pattern.reaches[0][0] is None


def test_tensors_are_told_apart():
    A = torch.zeros(1, 6, 5, dtype=torch.float64)
    A[0, :2, :3], A[0, 2:, 3:] = torch.randn(2, 3), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    pattern = find_pattern(on_axes(A, ((2,), (2, 2)), ((3,), (2,))))
    assert held(pattern, 6, 5)[2:, 3:].sum() == 4
    assert not (A[0].numpy() != 0)[~held(pattern, 6, 5)].any()


def test_samples_share_the_union_of_their_patterns():
    A = torch.zeros(2, 20, 20, dtype=torch.float64)
    A[0], A[1] = torch.eye(20), torch.eye(20).roll(1, 0)
    assert np.array_equal(held(find_pattern(from_dense(A)), 20, 20), (A != 0).any(0).numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_belong_to_the_pattern(value):
    A = torch.eye(20, dtype=torch.float64)
    A[3, 3] = value
    assert held(find_pattern(from_dense(A)), 20, 20)[3, 3]


def test_of_the_full_pattern_nothing_is_zero():
    pattern = full_pattern(from_dense(torch.zeros(3, 4)))
    assert held(pattern, 3, 4).all()
    assert not pattern.restricted
    assert pattern.n_groups == 3
