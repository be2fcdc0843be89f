from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from stabkit.errors import TraceError
from stabkit.tracing import trace
from stabkit.tracing.frontiers import Frontiers
from stabkit.tracing.graph import Graph
from stabkit.tracing.inputs import non_leaf
from stabkit.tracing.segments import Segment
from stabkit.tracing.values import value_of


def momentum(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    v = 0.9 * v + (2 * x).tanh()
    return x + v, v


def two_steps() -> tuple[Segment, list[Tensor]]:
    """The second of two momentum steps; its state is a pair, whose first member depends on the second."""
    x = non_leaf(torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    first = momentum(x, x.sin())
    second = momentum(*first)
    graph = Graph([value_of(x)], [value_of(second[0] * second[1])])
    frontiers = Frontiers(graph)
    start, stop = (max(graph.rank[value_of(t).node] for t in pair) + 1 for pair in (first, second))
    segment = Segment(graph, [value_of(t) for t in first], [value_of(t) for t in second], start, stop)
    assert set(segment.source) == set(frontiers.at(start))
    return segment, [t.detach() for t in first]


def test_products_with_tuple_states_are_partial_derivatives():
    segment, state = two_steps()
    blocks = jacobian(momentum, tuple(state))
    cotangents = [torch.randn(4, dtype=torch.float64) for _ in range(2)]
    for j, found in enumerate(segment.vjp(cotangents)):
        truth = sum(cotangents[i] @ blocks[i][j] for i in range(2))
        torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13)
    for i, found in enumerate(segment.jvp(cotangents)):
        truth = sum(blocks[i][j] @ cotangents[j] for j in range(2))
        torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("direction", ["vjp", "jvp"])
def test_products_with_many_vectors_are_those_with_one(direction):
    segment, _ = two_steps()
    many = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2)]
    together = getattr(segment, f"{direction}_batch")(many)
    for k in range(5):
        alone = getattr(segment, direction)([t[k] for t in many])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(all_of_them[k], one, rtol=1e-13, atol=1e-13)


def test_values_that_a_segment_only_carries_pass_unchanged():
    x = non_leaf(torch.randn(3, dtype=torch.float64))
    kept = x.sin()
    made = kept.exp()
    graph = Graph([value_of(x)], [value_of(made * kept)])
    segment = Segment(graph, [value_of(kept)], [value_of(kept), value_of(made)], 1, 2)
    carried, through = torch.randn(2, 3, dtype=torch.float64)
    (found,) = segment.vjp([carried, through])
    torch.testing.assert_close(found, carried + through * made)
    assert torch.equal(segment.jvp([carried])[0], carried)


def test_operations_without_a_batching_rule_are_looped_over():
    class Numpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(2 * ctx.saved_tensors[0].numpy() * grad.numpy())

    x = torch.randn(2, 3, dtype=torch.float64)
    dense = trace(Numpy.apply, x, depth="cuts").jacobian().dense()
    torch.testing.assert_close(dense, torch.diag_embed(2 * x))


def test_batched_products_do_not_trust_torch_vmap():
    # torch 2.14 on CPU: vmap over the backward of cdist is silently wrong
    x, y = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    flow = trace(lambda x: torch.cdist(x.sin(), y), x)
    for sample in range(2):
        truth = jacobian(lambda one: torch.cdist(one.sin(), y[sample]).flatten(), x[sample]).flatten(1)  # noqa: B023
        torch.testing.assert_close(flow.jacobian().dense()[sample], truth, rtol=1e-11, atol=1e-11)
        u = torch.randn(2, 20, 3, dtype=torch.float64)
        torch.testing.assert_close((flow.jacobian() @ u)[sample], truth @ u[sample], rtol=1e-11, atol=1e-11)


def test_changing_the_weights_after_tracing_is_an_error_that_says_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    flow = trace(model, torch.randn(2, 3))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(TraceError, match=r"changed after it was traced.*call stabkit.trace again"):
        flow.steps[2].jacobian().dense()
    with pytest.raises(TraceError, match="changed after it was traced"):
        flow.jacobian() @ torch.randn(2, 3)


def test_no_weight_gradient_is_computed_on_the_way():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    flow = trace(model, torch.randn(2, 3))
    flow.jacobian() @ torch.randn(2, 3)
    flow.jacobian().dense()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_products_leave_the_random_state_alone():
    flow = trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3))
    before = torch.get_rng_state()
    flow.jacobian() @ torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
