from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.functional import jacobian

from stabkit.errors import TraceError
from stabkit.tracing import Flow, trace
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Meta
from stabkit.tracing.products import step_products
from stabkit.tracing.products.step_products import Space

CPU = torch.device("cpu")


def per_sample(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """Dense Jacobians by plain autograd, ``(batch, m, n)``, of a function of a batch."""
    blocks = []
    for one in x.unbind(dim):
        block = jacobian(lambda s: function(s.unsqueeze(dim)).squeeze(dim).flatten(), one)
        blocks.append(block.reshape(block.shape[0], -1))
    return torch.stack(blocks)


def assert_jacobian(flow: Flow, start: int, stop: int, truth: Tensor) -> None:
    operator = flow.jacobian(start, stop)
    assert operator.shape == tuple(truth.shape)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-11, atol=1e-11)
    eye = torch.eye(truth.shape[2], dtype=truth.dtype).expand(truth.shape[0], -1, -1)
    torch.testing.assert_close(operator @ eye, truth, rtol=1e-11, atol=1e-11)


class Residual(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


def test_jacobians_of_steps_and_stretches_are_those_of_plain_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *(Residual(4) for _ in range(3)), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    flow = trace(model, x)
    assert len(flow) == 5
    for start in range(5):
        for stop in range(start + 1, 6):
            assert_jacobian(flow, start, stop, per_sample(model[start:stop], model[:start](x).detach()))


def test_the_batch_may_stand_on_another_axis():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=False, dropout=0.0).double().eval()
    x = torch.randn(3, 2, 4, dtype=torch.float64)  # (T, B, D)
    flow = trace(layer, x, batch_dim=1)
    assert flow.batch == 2
    assert not flow.notes
    assert_jacobian(flow, 0, len(flow), per_sample(layer, x, dim=1))


def test_the_batch_axis_may_move_from_state_to_state():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    flow = trace(lambda x: (x.transpose(0, 1) * 2).sin().permute(2, 0, 1).cumsum(0), x, depth="cuts")
    assert [state.layouts[0].axis for state in flow.states] == [0, 1, 1, 1, 2, 2]
    assert_jacobian(flow, 0, 5, per_sample(lambda x: (2 * x).sin().permute(2, 1, 0).cumsum(0).movedim(2, 0), x))


def test_side_inputs_are_held_fixed():
    model = nn.Bilinear(3, 2, 4).double()
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    flow = trace(model, x, y, source="0")
    assert flow.side_inputs == ("1",)
    truth = torch.einsum("oij,bj->boi", model.weight.detach(), y)
    assert_jacobian(flow, 0, len(flow), truth)


def test_complex_states_count_as_pairs_of_real_coordinates():
    x = torch.randn(2, 6, dtype=torch.float64)
    flow = trace(lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, n=6), x, depth="cuts")
    spectrum = flow.states[1]
    assert spectrum.tensors[0].is_complex()
    assert spectrum.size == 8
    assert torch.equal(spectrum.flatten()[0, :2], torch.view_as_real(torch.fft.rfft(x))[0, 0])
    assert_jacobian(flow, 0, len(flow), per_sample(lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, n=6), x))
    truth = per_sample(lambda x: torch.view_as_real(torch.fft.rfft(x)), x)
    assert_jacobian(flow, 0, 1, truth)


def test_complex_columns_may_be_slices():
    x = torch.randn(1, 4, dtype=torch.complex128)
    operator = trace(lambda x: x.exp(), x).jacobian()
    columns = torch.randn(1, 8, 3, dtype=torch.float64)
    together = operator @ columns
    for k in range(3):
        assert torch.equal((operator @ columns[..., k : k + 1])[..., 0], together[..., k])


def test_a_complex_tensor_may_follow_an_odd_number_of_real_coordinates():
    space = Space([Meta((1, 3), torch.float64, CPU), Meta((1, 2), torch.complex128, CPU)], [Layout(1, None)] * 2)
    columns = torch.randn(1, 7, 1, dtype=torch.float64)
    real, complex_part = space.unflatten(columns)
    assert torch.equal(real.flatten(), columns.flatten()[:3])
    assert torch.equal(torch.view_as_real(complex_part).flatten(), columns.flatten()[3:])


def test_a_jacobian_of_rounding_noise_is_zero_not_an_error():
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Linear(1, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    moved = trace(model, x).jacobian() @ torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(moved, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-8)


def test_steps_between_tuple_states_have_partial_jacobians():
    a, b = torch.randn(2, 3, 3, dtype=torch.float64)

    def momentum(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = v @ b + (x @ a).tanh()
        return x + v, v

    def forward(x: Tensor) -> Tensor:
        state = (x, x.sin())
        for _ in range(3):
            state = momentum(*state)
        return state[0] * state[1]

    x = torch.randn(2, 3, dtype=torch.float64)
    flow = trace(forward, x, depth="cuts")
    assert_jacobian(flow, 0, len(flow), per_sample(forward, x))


def test_space_turns_tuples_into_columns_and_back():
    metas = [Meta((4, 3), torch.float64, CPU), Meta((5, 2), torch.complex64, CPU)]
    space = Space(metas, [Layout(2, 0, outer=False), Layout(2, 1)])
    assert (space.batch, space.size, space.dtype) == (2, 6 + 10, torch.float64)
    assert space.sample_shapes == ((2, 3), (5,))
    columns = torch.randn(2, 16, 7, dtype=torch.float64).float().double()
    tensors = space.unflatten(columns)
    assert [tuple(t.shape) for t in tensors] == [(7, 4, 3), (7, 5, 2)]
    assert torch.equal(space.flatten(tensors), columns)


# ---------------------------------------------------------------- no forward product without a certificate


class Once(torch.autograd.Function):
    """x^2, whose backward is not differentiable a second time."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Numpy(torch.autograd.Function):
    """The same, computed by numpy behind autograd's back."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(np.asarray(2 * ctx.saved_tensors[0].numpy() * grad.detach().numpy()))


class HalfDetached(torch.autograd.Function):
    """The same; half of its backward is hidden from the double backward, which is wrong without an error."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * (grad + grad.detach())


class Lying(torch.autograd.Function):
    """The same; the backward's own backward is a hand-written, wrong one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return _LyingBackward.apply(grad, ctx.saved_tensors[0])


class _LyingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(x)
        return 2 * x * grad

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] * grad, None


@pytest.mark.parametrize("function", [Once, Numpy, HalfDetached, Lying])
def test_an_uncertified_double_vjp_is_never_used(function):
    weight = torch.randn(3, 3, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    flow = trace(lambda x: function.apply(x @ weight).sin(), x, depth="cuts")
    truth = per_sample(lambda x: ((x @ weight) ** 2).sin(), x)
    assert_jacobian(flow, 0, len(flow), truth)
    made = flow.steps[1].products
    made.forward(torch.randn(2, 3, 1, dtype=torch.float64))
    assert made.path != "double vjp"
    assert any(attempt.startswith("double vjp") for attempt in made.attempts)


def test_without_any_certified_way_the_forward_product_is_refused(monkeypatch):
    monkeypatch.setattr(step_products, "_DENSE_BYTES", 0)  # no dense detour
    x = torch.randn(2, 3, dtype=torch.float64)
    operator = trace(HalfDetached.apply, x, depth="cuts").jacobian()
    with pytest.raises(TraceError, match=r"no forward product .* could be certified .*J\.T @ U"):
        operator @ x
    assert torch.equal(operator.T @ x, 2 * x * x)


def test_the_way_taken_is_recorded():
    x = torch.randn(2, 3, dtype=torch.float64)
    flow = trace(lambda x: Once.apply(x.sin()), x, depth="cuts")
    for step in flow.steps:
        step.jacobian() @ x
    assert flow.steps[0].products.path == "double vjp"
    assert flow.steps[1].products.path == "dense from vjp"


def test_half_precision_steps_are_certified_at_their_own_precision():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).bfloat16()
    operator = trace(model, torch.randn(2, 3, dtype=torch.bfloat16)).jacobian()
    assert (operator @ torch.randn(2, 3)).isfinite().all()


def test_vectors_lie_one_after_the_other_in_memory():
    space = Space([Meta((2, 3), torch.float64, CPU)], [Layout(2, 0)])
    columns = torch.randn(2, 3, 5, dtype=torch.float64)
    (tensor,) = space.unflatten(columns)
    assert tensor.is_contiguous()
    assert torch.equal(space.flatten([tensor]), columns)
    assert space.flatten([tensor]).data_ptr() == tensor.data_ptr()


def test_complex_tensors_have_an_axis_of_pairs():
    space = Space([Meta((2, 3), torch.complex64, CPU), Meta((2, 4), torch.float32, CPU)], [Layout(2, 0)] * 2)
    assert space.axes == ((3, 2), (4,))
