from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.walk import Observer, drawn, loss_columns, random_columns, walk_back


def orthogonal(gain: float, depth: int = 6, dtype: torch.dtype = torch.float64, width: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=gain)
    return nn.Sequential(*layers).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)


def columns_of(flow: stabkit.tracing.Flow, count: int) -> Tensor:
    return random_columns(flow, range(count))


def test_growth_through_orthogonal_layers_is_their_gain():
    flow = stabkit.trace(orthogonal(0.3), torch.ones(3, 10).double())
    walk = walk_back(flow, columns_of(flow, 2))
    assert walk.growth.shape == (6, 3, 2)
    assert walk.growth.flatten().tolist() == pytest.approx([math.log(0.3)] * 36, abs=1e-6)
    torch.testing.assert_close(walk.log_norms[:-1] - walk.log_norms[1:], walk.growth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gain", [2.0**-9, 2.0**9])
def test_growth_beyond_the_range_of_a_dtype(dtype, gain):
    # 2^(9 * 40) leaves every range; the identity times a power of two is exact in all of them
    layers = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(40)]).to(dtype)
    for layer in layers:
        layer.weight.data = gain * torch.eye(4, dtype=dtype)
    flow = stabkit.trace(layers, torch.zeros(2, 4, dtype=dtype), check=False)
    walk = walk_back(flow, columns_of(flow, 3))
    assert (walk.growth - math.log(gain)).abs().max() < 1e-14
    assert float((walk.log_norms[0] - walk.log_norms[-1] - 40 * math.log(gain)).abs().max()) < 1e-11


@pytest.mark.parametrize("power", [-300, -60, -1, 1, 60, 300])
def test_a_loss_in_other_powers_of_two_gives_the_same_growth_to_the_last_bit(power):
    flow = stabkit.trace(network(), torch.randn(5, 6).double())
    columns = columns_of(flow, 2)
    plain, scaled = (walk_back(flow, columns * 2.0**p) for p in (0, power))
    assert torch.equal(plain.growth, scaled.growth)
    shift = scaled.log_norms - plain.log_norms
    torch.testing.assert_close(shift, torch.full_like(shift, power * math.log(2)))


def test_a_loss_in_other_units_gives_the_same_growth_to_rounding():
    flow = stabkit.trace(network(), torch.randn(5, 6).double())
    columns = columns_of(flow, 2)
    plain, scaled = (walk_back(flow, columns * unit) for unit in (1.0, 3.0))
    assert (plain.growth - scaled.growth).abs().max() < 1e-14


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_a_batch_of_cotangents_is_what_single_ones_are(memory):
    flow = stabkit.trace(network(), torch.randn(5, 6).double(), memory=memory)
    columns = columns_of(flow, 4)
    together = walk_back(flow, columns)
    for i in range(4):
        alone = walk_back(flow, columns[..., i : i + 1])
        torch.testing.assert_close(together.growth[..., i], alone.growth[..., 0], rtol=0, atol=1e-13)
        torch.testing.assert_close(together.log_norms[..., i], alone.log_norms[..., 0], rtol=0, atol=1e-13)


def test_little_memory_makes_several_batches_of_the_same(monkeypatch):
    flow = stabkit.trace(network(), torch.randn(5, 6).double())
    columns = columns_of(flow, 5)
    whole = walk_back(flow, columns)
    monkeypatch.setattr("stabkit.walk.backwards._BYTES", 2 * max(s.segment.footprint()[0] for s in flow.steps))
    torch.testing.assert_close(walk_back(flow, columns).growth, whole.growth, rtol=0, atol=1e-13)


def test_an_operation_that_cannot_be_batched_is_walked_one_by_one():
    # the batching rule of the backward of cdist is silently wrong in torch 2.14
    points = torch.randn(4, 3).double()
    flow = stabkit.trace(lambda x: torch.cdist(x, points).tanh(), torch.randn(2, 5, 3).double(), depth="cuts")
    columns = columns_of(flow, 3)
    together = walk_back(flow, columns)
    for i in range(3):
        torch.testing.assert_close(
            together.growth[..., i], walk_back(flow, columns[..., i : i + 1]).growth[..., 0], rtol=0, atol=1e-12
        )


def test_norms_are_those_of_the_gradient():
    model, x = network(), torch.randn(3, 6).double().requires_grad_()
    flow = stabkit.trace(model, x)
    walk = walk_back(flow, loss_columns(flow, [lambda out: 1e-3 * out.square().sum()]))
    (grad,) = torch.autograd.grad(1e-3 * model(x).square().sum(), x)
    torch.testing.assert_close(walk.log_norms[0, :, 0], grad.norm(dim=1).log(), rtol=1e-12, atol=0)


def with_dead_head() -> nn.Sequential:
    model = nn.Sequential(*orthogonal(0.5), nn.Linear(10, 3, dtype=torch.float64))
    nn.init.zeros_(model[6].weight)
    return model


def test_what_passes_nothing_ends_a_walk_without_renewal():
    flow = stabkit.trace(with_dead_head(), torch.ones(2, 10).double())
    walk = walk_back(flow, columns_of(flow, 1))
    assert (walk.growth[6] == -math.inf).all()
    assert walk.growth[:6].isnan().all()
    assert (walk.log_norms[:7] == -math.inf).all()
    assert walk.restarts == ()


@pytest.mark.parametrize("renewal", ["together", "each"])
def test_what_lies_before_is_walked_with_new_cotangents(renewal):
    flow = stabkit.trace(with_dead_head(), torch.ones(2, 10).double())
    walk = walk_back(flow, columns_of(flow, 2), [3, 4], renewal=renewal)
    assert walk.restarts == (6,)
    assert (walk.growth[6] == -math.inf).all()
    assert (walk.growth[:6] - math.log(0.5)).abs().max() < 1e-6
    expected = drawn(flow.states[6].space, [3 + 6, 4 + 6]).norm(dim=1).log()
    torch.testing.assert_close(walk.log_norms[6], expected, rtol=1e-14, atol=1e-14)


def test_one_silent_sample_is_renewed_alone_and_stays_known_as_silent():
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    model = nn.Sequential(*orthogonal(0.5, 2), Gate())
    W = (model[1].weight @ model[0].weight).detach()
    x = torch.linalg.solve(W, torch.stack([torch.ones(10), -torch.ones(10)]).double().T).T
    flow = stabkit.trace(model, x)
    columns = columns_of(flow, 1)
    kept, renewed = walk_back(flow, columns, [0]), walk_back(flow, columns, [0], renewal="each")
    assert kept.growth[:2, 1].isnan().all()
    assert (renewed.growth[:2, 1] - math.log(0.5)).abs().max() < 1e-6
    assert (renewed.log_norms[:3, 1] == -math.inf).all()  # nothing of the loss came back to it
    assert torch.equal(kept.growth[:, 0], renewed.growth[:, 0])
    assert renewed.restarts == ()


class Beside(Observer):
    width = 2

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def beside(self, step):
        return torch.ones(step.target.space.batch, step.target.size, 2).double() if step.index % 2 else None

    def passed(self, passage, pulled):
        if pulled is not None:
            self.seen.append((passage.step.index, pulled, passage.leaving.columns))


@pytest.mark.parametrize("count", [0, 3])
def test_an_observer_sends_columns_of_its_own_through_single_steps(count):
    flow = stabkit.trace(network(), torch.randn(5, 6).double())
    columns = columns_of(flow, count) if count else torch.zeros(5, 4, 0).double()
    observer = Beside()
    walk = walk_back(flow, columns, observers=[observer])
    assert [index for index, _, _ in observer.seen] == [3, 1]
    for index, pulled, leaving in observer.seen:
        J = flow.steps[index].jacobian()
        expected = J.rmatmat(torch.ones(5, J.shape[1], 2).double())
        torch.testing.assert_close(pulled, expected, rtol=1e-13, atol=1e-13)
        assert leaving.shape[2] == count
    torch.testing.assert_close(walk.growth, walk_back(flow, columns).growth, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [6, 100], ids=["whole Jacobians", "products"])
def test_an_iterated_map_is_walked_too(size):
    torch.manual_seed(0)
    W = 0.7 * torch.linalg.qr(torch.randn(size, size).double()).Q
    flow = stabkit.iterate(lambda x: x @ W.T, torch.ones(3, size).double(), 9)
    columns = columns_of(flow, 2)
    walk = walk_back(flow, columns)
    assert (walk.growth - math.log(0.7)).abs().max() < 1e-12
    assert walk.growth.shape == (9, 3, 2)
