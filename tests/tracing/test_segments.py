from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from stabkit.errors import TraceError
from stabkit.tracing import trace
from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import value_of
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.recording.inputs import non_leaf


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


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1), nn.GELU()]
    model = nn.Sequential(*layers)
    model(torch.randn(5, 2, 7))
    return model.eval()


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = convolutions()

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)).relu() + x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["vjp", "jvp"])
def test_stacked_walks_are_those_with_one_vector(direction, dtype):
    model, x = Skip().to(dtype), torch.randn(3, 2, 7, dtype=dtype)
    segment = trace(model, x).jacobian().origin.products.segment
    many = torch.randn(4, 3, 2, 7, dtype=dtype)
    before = many.clone()
    (together,) = getattr(segment, f"{direction}_batch")([many])
    assert segment._stacks or direction == "jvp"
    assert segment._vmap[direction] == "right"
    assert torch.equal(many, before)  # reused tensors are never those of the caller
    for k in range(4):
        (alone,) = getattr(segment, direction)([many[k]])
        torch.testing.assert_close(together[k], alone)


def test_values_of_the_caller_survive_where_a_step_only_passes_them_on():
    x = torch.randn(2, 3)
    segment = trace(lambda x: (x + 0.0).relu() * 2.0 + 1.0, x).jacobian().origin.products.segment
    many = torch.randn(4, 2, 3)
    before = many.clone()
    (first,) = segment.vjp_batch([many])
    (second,) = segment.vjp_batch([many])
    assert torch.equal(many, before)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 2 * many * (x > 0))


def test_parts_of_a_segment_chain_to_the_whole():
    model, x = Skip().double(), torch.randn(3, 2, 7, dtype=torch.float64)
    segment = trace(model, x).jacobian().origin.products.segment
    cotangent = torch.randn(3, 2, 7, dtype=torch.float64)
    expected = segment.vjp([cotangent])
    for position in range(len(segment.nodes) + 1):
        after, before = segment.part(position, len(segment.nodes)), segment.part(0, position)
        assert set(before.target) == set(segment.live(position)) or position == len(segment.nodes)
        arrived = dict(zip(after.source, after.vjp([cotangent]), strict=True))
        torch.testing.assert_close(before.vjp([arrived[value] for value in before.target]), expected)


def test_the_footprint_counts_what_is_alive_at_once():
    x = torch.randn(2, 3, dtype=torch.float64)
    weight = torch.randn(3, 50, dtype=torch.float64)
    segment = trace(lambda x: x + (x @ weight).tanh() @ weight.T, x).jacobian().origin.products.segment
    most, widest = segment.footprint()
    assert widest == 2 * 50 * 8
    assert 2 * widest <= most <= 2 * widest + 4 * 2 * 3 * 8
