from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from stabkit.operators import Jacobian, compose, from_dense
from stabkit.operators import dense as dense_module
from stabkit.operators.sparsity import Pattern
from stabkit.tracing import trace


def truth(model: nn.Module, x: Tensor, dim: int = 0) -> Tensor:
    """Dense Jacobians by plain autograd, ``(batch, m, n)``."""
    blocks = [jacobian(lambda s: model(s.unsqueeze(dim)).squeeze(dim).flatten(), one) for one in x.unbind(dim)]
    return torch.stack([block.reshape(block.shape[0], -1) for block in blocks])


def assert_path(J: Jacobian, expected: Tensor, words: str) -> None:
    """The dense matrix is right, and its path says ``words``; the operator is as it was."""
    before = J.path
    found, path = J.dense(return_path=True)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert words in path
    assert J.path == before


def built(model: nn.Module, x: Tensor, *, batch_dim: int = 0, words: str) -> Jacobian:
    """The Jacobian of a model, dense, checked with and without structure; ``words`` say how it was found."""
    model.eval().double()
    x = x.double()
    J = trace(model, x, batch_dim=batch_dim).jacobian()
    expected = truth(model, x, batch_dim)
    assert_path(J, expected, words)
    plain, path = J.dense(structure=False, return_path=True)
    torch.testing.assert_close(plain, expected, rtol=1e-11, atol=1e-12)
    assert path.endswith(" J^T U")
    return J


class Convolutional(nn.Module):
    """A residual block with batch norms that have seen data."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        self.inner = nn.Sequential(*layers)
        self.inner(torch.randn(4, channels, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)).relu()


class Attention(nn.Module):
    """A pre-norm block, causal or not."""

    def __init__(self, size: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, size = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, size))
        return x + self.mlp(self.second(x))


def test_convolutions_are_pulled_back_in_groups_of_rows():
    torch.manual_seed(0)
    J = built(Convolutional(3), torch.randn(2, 3, 9, 10), words="75 products for 270 rows")
    assert J.shape == (2, 270, 270)


def test_the_first_factor_of_a_wide_step_is_pushed_forward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()).double()
    x = torch.randn(1, 1, 15, 16, dtype=torch.float64)
    J = trace(model, x).jacobian()
    assert_path(J, truth(model, x), "9 products for 240 rows")  # of the transpose
    plain, path = J.dense(structure=False, return_path=True)
    torch.testing.assert_close(plain, truth(model, x), rtol=1e-11, atol=1e-12)
    assert path.endswith("240 products J V")


def test_elementwise_steps_take_one_product():
    built(nn.Tanh(), torch.randn(2, 300), words="1 products for 300 rows")


def test_a_linear_step_is_its_weight():
    layer = nn.Linear(200, 210)
    J = built(layer, torch.randn(2, 200), words="from the weights of 1 layers")
    assert torch.equal(J.dense()[1], layer.weight.detach())


@pytest.mark.parametrize("batch", [1, 3])
def test_the_last_weight_starts_the_chain(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 220), nn.GELU(), nn.Linear(220, 200))
    built(model, torch.randn(batch, 200), words="from the weights of 1 layers")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_built_around_its_middle(causal, batch):
    torch.manual_seed(0)
    words = "one block for each of 8 sites before and after a middle of 256 products"
    J = built(Attention(32, 4, causal=causal), torch.randn(batch, 8, 32), words=words)
    future = J.dense()[0].view(8, 32, 8, 32)[0, :, 1:]
    assert bool((future == 0).all()) == causal


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_batch_may_stand_behind_the_tokens(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
    x = torch.randn(2, 8, 32) if batch_first else torch.randn(8, 2, 32)
    built(layer, x, batch_dim=0 if batch_first else 1, words="one block for each of 8 sites")


def test_what_keeps_tokens_apart_takes_one_product_for_a_channel():
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    built(model, torch.randn(2, 20, 12), words="12 products for 240 rows")


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean((1, 2, 3), keepdim=True)


def test_steps_that_mix_everything_are_built_row_by_row():
    built(Mixing(), torch.randn(1, 3, 8, 9), words="216 products J^T U")


def test_a_recurrent_cell_has_the_jacobian_of_autograd():
    torch.manual_seed(0)
    cell = nn.GRUCell(5, 200)
    drive = torch.randn(2, 5, dtype=torch.float64)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, state: Tensor) -> Tensor:
            return self.cell(drive[: len(state)] * 0 + 1, state)

    built(Step(), torch.randn(2, 200), words="J^T U")


def test_a_wrong_pattern_is_caught_and_said_so(monkeypatch):
    find = dense_module.find_pattern

    def planted(J: Jacobian) -> Pattern:
        right = find(J)
        (one, channels, rows, columns) = right.reaches[0]
        assert rows is not None
        lost = tuple(tuple(table.copy() for table in tables) for tables in rows)
        lost[0][2][5, 4] = False  # one row of pixels no longer sees its neighbour
        return Pattern(right.row_shapes, right.column_shapes, ((one, channels, lost, columns),), 0)

    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 2, 3, padding=1).double(), torch.randn(1, 2, 11, 12, dtype=torch.float64)
    J = trace(model, x).jacobian()
    monkeypatch.setattr(dense_module, "find_pattern", planted)
    assert_path(J, truth(model, x), "264 products J^T U (")
    assert "times what rounding explains" in J.dense(return_path=True)[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_structure_holds_in_every_dtype(dtype, tolerance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)).to(dtype)
    x = torch.randn(2, 2, 10, 11, dtype=dtype)
    J = trace(model, x).jacobian()
    found, path = J.dense(return_path=True)
    assert found.dtype == dtype
    assert "50 products for 220 rows" in path
    torch.testing.assert_close(found.double(), truth(model.double(), x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_saved_tensors_may_be_computed_anew(memory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 220), nn.GELU(), nn.Linear(220, 200)).double()
    x = torch.randn(2, 200, dtype=torch.float64)
    J = trace(model, x, memory=memory).jacobian()
    torch.testing.assert_close(J.dense(), truth(model, x), rtol=1e-11, atol=1e-12)


def test_operators_without_a_recording_keep_their_structure():
    torch.manual_seed(0)
    band = torch.randn(1, 300, 300, dtype=torch.float64).tril(1).triu(-1)
    J = from_dense(band)
    product = compose(Jacobian(J.shape, J.matmat, J.rmatmat, dtype=J.dtype, device=J.device), J)
    assert_path(product, band @ band, "5 products for 300 rows")


def test_the_result_must_fit_in_memory():
    J = trace(nn.Tanh(), torch.randn(1, 300)).jacobian()
    with pytest.raises(ValueError, match=r"takes 351.6 KiB and .* memory=200 KiB is all .*J\.sparse\(\)"):
        J.dense(memory=200 * 1024)
    with pytest.raises(ValueError, match="memory=0; expected a positive number"):
        J.dense(memory=0)
    with pytest.raises(ValueError, match="chunk=0"):
        J.dense(0)


def test_little_memory_means_few_products_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 4000), nn.Tanh(), nn.Linear(4000, 100)).double()
    J = trace(model, torch.randn(1, 100, dtype=torch.float64)).jacobian()
    widths = []

    class Counting(Jacobian):
        def rmatmat(self, U: Tensor) -> Tensor:
            widths.append(U.shape[2])
            return super().rmatmat(U)

    counting = Counting(J.shape, J._matmat, J._rmatmat, dtype=J.dtype, device=J.device, origin=J.origin)
    room = 2**20
    counting.dense(memory=room)
    assert 1 < max(widths) < 10  # one product takes two tensors of 4000 float64 at a time, and more
    assert sum(widths) == 100
    widths.clear()
    counting.dense()
    assert widths == [100]
