from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stabkit.operators import from_dense
from stabkit.operators import sparse as sparse_module
from stabkit.operators.sparsity import Pattern
from stabkit.tracing import trace
from tests.operators.test_dense import Attention, truth


def assert_sparse(model: nn.Module, x: Tensor) -> str:
    """Compare with plain autograd; returns how the matrices were found."""
    model.eval().double()
    x = x.double()
    J = trace(model, x).jacobian()
    (found, path), expected = J.sparse(return_path=True), truth(model, x).numpy()
    assert len(found) == len(x)
    for matrix, block in zip(found, expected, strict=True):
        assert matrix.format == "csr"
        assert matrix.has_canonical_format
        np.testing.assert_allclose(matrix.toarray(), block, rtol=1e-11, atol=1e-12)
    return path


@settings(deadline=None, max_examples=15)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(4, 20), st.integers(3, 5)),
    transposed=st.booleans(),
)
def test_convolutions_of_every_shape_are_exact(kernel, stride, padding, dilation, groups, size, transposed):
    reach = [dilation * (k - 1) for k in kernel]
    assume(all(s + 2 * padding > r for s, r in zip(size, reach, strict=True)))
    assume(all((s - 1) * stride + r + 1 > 2 * padding for s, r in zip(size, reach, strict=True)))
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    assert_sparse(nn.Sequential(layer, nn.Tanh()), torch.randn(1, 4, *size))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_found_by_the_blocks_of_its_tokens(causal):
    path = assert_sparse(Attention(32, 4, causal=causal), torch.randn(2, 8, 32))
    assert "one block for each of 8 sites" in path


@pytest.mark.parametrize("size", [20, 60])
def test_products_do_not_grow_with_the_image(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)).double()
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    J = trace(model, x).jacobian()
    (matrix,), path = J.sparse(return_path=True)
    assert f"50 products for {2 * size**2} rows" in path
    u = torch.randn(2 * size**2, dtype=torch.float64)
    np.testing.assert_allclose(matrix @ u.numpy(), J.matvec(u[None])[0].numpy(), rtol=1e-10, atol=1e-10)


def test_depthwise_channels_share_products():
    path = assert_sparse(nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.randn(2, 6, 8, 9))
    assert "9 products for 432 rows" in path


def test_shuffled_channels_are_followed():
    model = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1, groups=3), nn.ChannelShuffle(3), nn.Tanh())
    assert "6 products for 240 rows" in assert_sparse(model, torch.randn(1, 6, 40))


def test_pooling_has_the_pattern_of_its_windows():
    model = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d(2))
    assert_sparse(model, torch.randn(2, 3, 13, 17))


def test_channels_last_rows_come_in_their_own_order():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    assert "27 products for 240 rows" in assert_sparse(Last(), torch.randn(1, 8, 10, 3))


def test_states_of_several_tensors_have_rows_of_each():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 6, dtype=torch.float64)

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v + (x @ a).tanh()
        return x + v, v

    def forward(x: Tensor) -> Tensor:
        x, v = step(*step(x, x @ b))
        return x * v

    x = torch.randn(2, 6, dtype=torch.float64)
    for part in trace(forward, x, depth="cuts").steps:
        J = part.jacobian()
        for matrix, block in zip(J.sparse(), J.dense(structure=False), strict=True):
            np.testing.assert_allclose(matrix.toarray(), block.numpy(), rtol=1e-12, atol=1e-12)


def test_causal_attention_is_block_triangular():
    torch.manual_seed(0)
    model = Attention(8, 2, causal=True).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    (matrix,) = trace(model, x).jacobian().sparse()
    assert matrix.nnz == 6 * 7 // 2 * 8 * 8
    np.testing.assert_allclose(matrix.toarray(), truth(model, x)[0].numpy(), rtol=1e-11, atol=1e-12)


def test_an_explicit_matrix_keeps_its_nonzeros():
    (matrix,) = from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).sparse()
    assert matrix.nnz == 1
    assert matrix[0, 1] == 2


def test_a_wrong_pattern_is_caught_and_said_so(monkeypatch):
    find = sparse_module.find_pattern

    def planted(J):
        right = find(J)
        narrow = tuple(tuple(np.eye(*table.shape, dtype=bool) for table in tables) for tables in right.reaches[0][-1])
        return Pattern(right.row_shapes, right.column_shapes, ((None, None, narrow),), 0)

    monkeypatch.setattr(sparse_module, "find_pattern", planted)
    path = assert_sparse(nn.Conv1d(1, 1, 3, padding=1), torch.randn(1, 1, 30))
    assert "30 products (" in path
    assert "times what rounding explains" in path


def test_the_matrices_must_fit_in_memory():
    J = trace(nn.Linear(300, 300), torch.randn(1, 300)).jacobian()
    with pytest.raises(ValueError, match=r"takes 703.1 KiB .* memory=500 KiB"):
        J.sparse(memory=500 * 1024)


def test_half_precision_comes_back_in_float32():
    model = nn.Conv1d(1, 1, 3, padding=1, dtype=torch.bfloat16)
    (matrix,) = trace(model, torch.randn(1, 1, 30, dtype=torch.bfloat16)).jacobian().sparse()
    assert matrix.dtype == np.float32
    assert matrix.nnz == 88
