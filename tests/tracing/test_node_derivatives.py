from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from stabkit.tracing import trace
from stabkit.tracing.graph.values import value_of
from stabkit.tracing.products.node_derivatives import apply_node
from stabkit.tracing.products.stacked_cotangents import Stacked


def test_broadcast_dimensions_are_summed_and_dtypes_cast_as_the_engine_does():
    x = torch.randn(3, requires_grad=True).clone()
    out = x.double() + torch.zeros(2, 3, dtype=torch.float64)
    node = value_of(out).node
    (cast,) = [parent for parent, _ in node.next_functions if parent is not None]
    ((value, grad),) = apply_node(node, [torch.ones(2, 3, dtype=torch.float64)], [value_of(x)._replace(node=cast)])
    assert grad.tolist() == [2, 2, 2]
    ((_, grad),) = apply_node(value.node, [grad], [value_of(x)])
    assert grad.dtype == torch.float32


def test_only_active_inputs_get_a_cotangent():
    a, b = (torch.randn(2, requires_grad=True).clone() for _ in range(2))
    node = value_of(a * b).node
    pulled = dict(apply_node(node, [torch.ones(2)], [value_of(b)]))
    assert set(pulled) == {value_of(b)}
    assert torch.equal(pulled[value_of(b)], a)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3).eval(), nn.InstanceNorm2d(3), nn.BatchNorm2d(3)])
def test_batch_norm_before_a_transpose_has_the_right_jacobian(norm, batch):
    # torch's own backward is silently wrong at batch size 1 for these strides; finite differences are not
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.Flatten(2)).double()
    weight = torch.randn(4, 3, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        return model(x).transpose(1, 2) * weight

    x = torch.randn(batch, 2, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    u = torch.randn_like(x)
    found = trace(forward, x, batch_dim=None, depth="cuts").jacobian() @ u.reshape(1, -1, 1)
    eps = 1e-5
    truth = (forward(x + eps * u) - forward(x - eps * u)) / (2 * eps)
    torch.testing.assert_close(found.flatten(), truth.flatten(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv1d(4, 2, 2, dilation=2, padding="same", padding_mode="circular"),
        nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose1d(4, 4, 2, groups=4, dilation=2),
    ],
)
def test_forward_products_of_convolutions_need_no_weight_gradient(convolution):
    convolution = convolution.double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    operator = trace(nn.Sequential(convolution, nn.Tanh()), x).jacobian()
    for sample in range(2):
        truth = jacobian(lambda one: convolution(one.unsqueeze(0)).tanh().flatten(), x[sample]).flatten(1)
        eye = torch.eye(32, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(operator.matmat(eye)[sample], truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operator.dense()[sample], truth, rtol=1e-12, atol=1e-12)


def test_a_custom_function_may_return_fewer_gradients_than_arguments():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, factor, x):
            ctx.factor = factor
            return x * factor, x + 1

        @staticmethod
        def backward(ctx, first, second):
            return None, first * ctx.factor + second

    x = torch.randn(2, 3, dtype=torch.float64)
    dense = trace(lambda x: Scale.apply(3.0, x)[0].tanh(), x, depth="cuts").jacobian().dense()
    truth = 3 * (1 - (3 * x).tanh() ** 2)
    torch.testing.assert_close(dense, torch.diag_embed(truth), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 8)),
        (nn.Conv1d(4, 4, 3, dilation=2, groups=4), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
        (nn.BatchNorm1d(4).eval(), (3, 4, 5)),
        (nn.BatchNorm2d(4, affine=False).eval(), (3, 4, 5, 2)),
        (nn.GELU(), (3, 4)),
        (nn.SiLU(), (3, 4)),
        (nn.Softplus(), (3, 4)),
        (nn.Hardswish(), (3, 4)),
        (nn.LogSigmoid(), (3, 4)),
    ],
)
def test_rewritten_nodes_agree_with_the_engine(layer, shape, dtype):
    torch.manual_seed(0)
    layer = layer.to(dtype)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(shape, dtype=dtype, requires_grad=True).clone()
    out = layer(x)
    cotangents = torch.randn(3, *out.shape, dtype=dtype)
    node, active = value_of(out).node, [value_of(x)]
    stacked = dict(Stacked(node, active).pull([cotangents]))[value_of(x)] if Stacked(node, active).by_rule else None
    for k in range(3):
        (expected,) = torch.autograd.grad(out, x, cotangents[k], retain_graph=True)
        ((_, rewritten),) = apply_node(node, [cotangents[k]], active, rewrite=True)
        torch.testing.assert_close(rewritten, expected)
        if stacked is not None:
            torch.testing.assert_close(stacked[k], expected)


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    size=st.integers(3, 12),
    transposed=st.booleans(),
    double=st.booleans(),
)
def test_convolutions_are_pulled_back_by_their_transposes(
    kernel, stride, padding, dilation, groups, size, transposed, double
):
    reach = dilation * (kernel - 1)
    assume(size + 2 * padding > reach)
    assume((size - 1) * stride + reach + 1 > 2 * padding)
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = kind(4, 2, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups).requires_grad_(False)
    dtype = torch.float64 if double else torch.float32
    x = torch.randn(2, 4, size, dtype=dtype, requires_grad=True).clone()
    out = layer.to(dtype)(x)
    cotangents = torch.randn(3, *out.shape, dtype=dtype)
    node, active = value_of(out).node, [value_of(x)]
    ((_, stacked),) = Stacked(node, active).pull([cotangents])
    for k in range(3):
        (expected,) = torch.autograd.grad(out, x, cotangents[k], retain_graph=True)
        ((_, rewritten),) = apply_node(node, [cotangents[k]], active, rewrite=True)
        torch.testing.assert_close(stacked[k], expected)
        torch.testing.assert_close(rewritten, expected)
