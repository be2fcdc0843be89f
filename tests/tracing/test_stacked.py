from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation has it
from torch import Tensor, nn

from stabkit.tracing import trace
from stabkit.tracing.graph.values import operation, value_of
from stabkit.tracing.products import stacked_cotangents as rules
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.products.stacked_cotangents import Stacked

_W = torch.linspace(-1, 1, 4, dtype=torch.float64)
_M = torch.linspace(-2, 1, 12, dtype=torch.float64).reshape(4, 3)

#: Of x (2, 3, 4), the first dimension being the samples; each holds an operation that has a rule.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "broadcast sum": lambda x: x[:, :1] + x,
    "broadcast product": lambda x: x * x.sum(1, keepdim=True) * _W,
    "quotient": lambda x: x / (1 + x * x),
    "where": lambda x: torch.where(x > 0, x, x * x),
    "masked": lambda x: (2 * x).masked_fill(x > 0.5, 1.0),
    "powers": lambda x: (1 + x * x).sqrt() + (1 + x * x).rsqrt() + x**3 + (2 + x * x).log() + (-x).exp() + x.abs(),
    "angles": lambda x: x.sin() * x.cos() + x.erf() + (2 + x.clamp(-1, 1)).reciprocal(),
    "activations": lambda x: F.gelu(x) + F.silu(x) + x.tanh() + x.sigmoid() + F.elu(x) + F.softplus(x) + x.relu(),
    "layer norm": lambda x: F.layer_norm(x, (4,), _W, _W),
    "layer norm of two dimensions": lambda x: F.layer_norm(x, (3, 4)),
    "layer norm of a transpose": lambda x: F.layer_norm(x.transpose(1, 2), (3,)),
    "softmax": lambda x: x.softmax(1) + x.softmax(-1),
    "attention": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "attention of several heads": lambda x: F.scaled_dot_product_attention(*(x.view(2, 3, 2, 2).transpose(1, 2),) * 3),
    "matrix of the source": lambda x: x[0] @ x[1].T,
    "linear": lambda x: x @ _M,
    "permute": lambda x: x.permute(2, 0, 1).permute(1, -1, 0) * 2,
    "transpose": lambda x: x[0].t() * x.transpose(-1, -2)[1],
    "expand": lambda x: x[:, None].expand(-1, 5, -1, -1) * torch.arange(5.0, dtype=x.dtype).view(5, 1, 1),
    "select": lambda x: x[:, -1] * x.select(1, 0),
    "slice": lambda x: x[:, 1:] * x[..., :2, :] + x[:, ::2],
    "unbind": lambda x: x.unbind(1)[0] * x.unbind(1)[2],
    "split": lambda x: x.split([1, 3], -1)[1] * x.split(3, -1)[0] + x.chunk(2, -1)[1].sum(-1, keepdim=True),
    "unsafe split": lambda x: torch.unsafe_split(x, 2, -1)[0] * x.unsafe_split(2, -1)[1],
    "stack": lambda x: torch.stack([x, x * x, torch.ones_like(x)], 1),
    "cat": lambda x: torch.cat([x, torch.ones(2, 1, 4, dtype=x.dtype), x * x], 1),
    "cat of two constants": lambda x: torch.cat([torch.ones(2, 1, 4, dtype=x.dtype), x, x.new_ones(2, 2, 4)], 1),
    "mean and sum": lambda x: (
        x - x.mean((0, -1), keepdim=True) + x.sum(1, keepdim=True) * x.mean() + x.mean(-1)[..., None]
    ),
    "reshape": lambda x: x.flatten(1).unflatten(1, (2, 6)).unsqueeze(1).squeeze(1),
    "group norm, without a rule": lambda x: F.group_norm(x, 3),
    "indices, without a rule": lambda x: x[:, torch.tensor([0, 2, 2])],
    "max pool, without a rule": lambda x: F.max_pool1d(x, 2),
    "cumulative sum, without a rule": lambda x: x.cumsum(1),
}


def _segment(function: Callable[[Tensor], Tensor]) -> Segment:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    return trace(function, x, batch_dim=None, depth="cuts").jacobian().origin.products.segment


@pytest.mark.parametrize("direction", ["vjp", "jvp"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_stacked_cotangents_come_back_as_each_alone(name, direction):
    segment = _segment(FUNCTIONS[name])
    walked = segment if direction == "vjp" else segment._linearize()[0]
    metas = segment.target_metas if direction == "vjp" else segment.source_metas
    many = [torch.randn(5, *meta.shape, dtype=meta.dtype) for meta in metas]
    before = [tensor.clone() for tensor in many]
    together = getattr(segment, f"{direction}_batch")(many)
    assert segment._vmap[direction] == "right"
    assert walked._stacks
    assert all(map(torch.equal, many, before))
    for k in range(5):
        alone = getattr(segment, direction)([tensor[k] for tensor in many])
        for one, stacked in zip(alone, together, strict=True):
            torch.testing.assert_close(stacked[k], one, rtol=1e-12, atol=1e-13)


def test_every_rule_is_tried_above():
    met = set()
    for function in FUNCTIONS.values():
        segment = _segment(function)
        for graph in (segment, segment._linearize()[0]):
            met |= {operation(node) for node in graph.nodes if Stacked(node, graph.graph.inputs[node]).by_rule}
    assert set(rules._OF_FIRST) <= met
    assert {name.removesuffix("Backward0") for name in rules._BY_NAME} <= met


def test_a_custom_function_is_not_stacked():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            assert grad.dim() == 3
            return 2 * grad

    segment = _segment(lambda x: Twice.apply(x * x))
    many = torch.randn(4, 2, 3, 4, dtype=torch.float64)
    (together,) = segment.vjp_batch([many])
    assert not segment._stacks
    torch.testing.assert_close(together[1], segment.vjp([many[1]])[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: sum(x[:, t].tanh() * (t + 1) for t in range(3)),
        lambda x: torch.stack([x[:, -1 - t, 1:].sin() for t in range(3)], 1) + x[..., :3],
        lambda x: x[:, 0] * x[:, 1] + (2 * x)[:, 2],
    ],
    ids=["select", "slices of selections", "beside the whole"],
)
def test_parts_of_one_value_are_put_together_in_place(function):
    segment = _segment(function)
    many = torch.randn(4, *segment.target_metas[0].shape, dtype=torch.float64)
    assert any(stacked.part_of is not None for stacked in _planned(segment, many))
    together = segment.vjp_batch([many])[0]
    alone = torch.stack([segment.vjp([one])[0] for one in many])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


def _planned(segment, many):
    segment.vjp_batch([many])
    return segment._plan


def test_a_derivative_is_kept_from_the_second_walk_on_until_it_is_released():
    segment = _segment(lambda x: F.silu(F.gelu(x)))
    many = torch.randn(4, 2, 3, 4, dtype=torch.float64)
    first, second, third = (segment.vjp_batch([many.clone()])[0] for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert sum(stacked._factor is not None for stacked in segment._plan) == 2
    segment.release()
    assert all(stacked._factor is None for stacked in segment._plan)


@pytest.mark.parametrize(
    "function", [lambda x: x + x, lambda x: x - 1, lambda x: 3 * x, lambda x: x.relu(), lambda x: x.tanh()]
)
def test_elementwise_nodes_take_stacked_cotangents_in_place(function):
    x = torch.randn(2, 3, requires_grad=True).clone()
    out = function(x)
    node = value_of(out).node
    active = [value_of(x)] * sum(parent is value_of(x).node for parent, _ in node.next_functions)
    assert Stacked(node, active).by_rule
    cotangents = torch.randn(4, 2, 3)
    (expected,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True, retain_graph=True)
    given = cotangents.clone()
    pulled = Stacked(node, active).pull([given], overwrite=True)
    torch.testing.assert_close(sum(grad for _, grad in pulled), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x, W: x @ W,
        lambda x, W: torch.addmm(W[0], x, W, alpha=0.5, beta=2),
        lambda x, W: nn.functional.linear(x, W.T),
        lambda x, W: x.view(3, 2, 2),
        lambda x, W: x.unflatten(1, (1, 4)),
        lambda x, W: x.reshape(12),
    ],
    ids=["mm", "addmm", "linear", "view", "unflatten", "reshape"],
)
def test_linear_layers_and_changes_of_shape_take_stacked_cotangents(function, dtype):
    torch.manual_seed(0)
    x, W = torch.randn(3, 4, dtype=dtype, requires_grad=True).clone(), torch.randn(4, 5, dtype=dtype)
    out = function(x, W)
    node, active = value_of(out).node, [value_of(x)]
    assert Stacked(node, active).by_rule
    cotangents = torch.randn(6, *out.shape, dtype=dtype)
    ((_, stacked),) = Stacked(node, active).pull([cotangents])
    expected = [torch.autograd.grad(out, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    torch.testing.assert_close(stacked, torch.stack(expected))
