from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import stabkit
from stabkit.errors import StabkitError, TraceError
from stabkit.tracing import iterate

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def henon(x: Tensor) -> Tensor:
    return torch.stack([1 - 1.4 * x[:, 0] ** 2 + x[:, 1], 0.3 * x[:, 0]], 1)


def plain_trajectory(step, x: Tensor, steps: int) -> Tensor:
    states = [x]
    for _ in range(steps):
        states.append(step(states[-1]))
    return torch.stack(states)


def test_states_are_those_of_the_plain_loop_in_any_order():
    flow = iterate(henon, 0.1 * normal(3, 2), 500)
    expected = plain_trajectory(henon, 0.1 * normal(3, 2), 500)
    for index in (500, 3, 250, 0, -1):
        torch.testing.assert_close(flow.states[index].tensors[0], expected[index], rtol=0, atol=0)
    torch.testing.assert_close(flow.trajectory(), expected, rtol=0, atol=0)
    torch.testing.assert_close(flow.trajectory(every=7), expected[::7], rtol=0, atol=0)
    torch.testing.assert_close(flow.output, expected[-1], rtol=0, atol=0)
    assert (len(flow), flow.batch, len(flow.states), flow.steps[499].target.index) == (500, 3, 501, 500)


@pytest.mark.parametrize("size", [2, 70])
def test_jacobians_of_steps_and_stretches(size):
    W = normal(size, size) / size**0.5
    step = lambda x: torch.tanh(x @ W)  # noqa: E731
    flow = iterate(step, normal(2, size, seed=1), 6)
    eye = torch.eye(size, dtype=DOUBLE).expand(2, size, size)
    for start, stop in ((0, 1), (2, 5)):
        points = flow.states[start].tensors[0]

        def stretch(x: Tensor, count: int = stop - start) -> Tensor:
            return plain_trajectory(step, x, count)[-1]

        exact = torch.stack([jacobian(stretch, point) for point in points])
        J = flow.jacobian(start, stop)
        torch.testing.assert_close(J.matmat(eye), exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(J.rmatmat(eye), exact.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("size", [2, 70])
def test_tangents_cover_every_step_once_in_the_order_of_the_sweep(size, adjoint):
    W = normal(size, size) / size**0.5
    step = lambda x: torch.sin(x @ W)  # noqa: E731
    flow = iterate(step, normal(3, size, seed=1), 9)
    seen = []
    columns = normal(3, size, 4, seed=2)
    for piece in flow.tangents(4, adjoint=adjoint):
        order = list(piece.steps)
        seen += order[::-1] if adjoint else order
        for place, index in enumerate(order):
            exact = torch.stack([jacobian(step, point) for point in flow.states[index].tensors[0]])
            if piece.dense is not None:
                torch.testing.assert_close(piece.dense[place], exact, rtol=0, atol=1e-12)
            else:
                product = (exact.mT if adjoint else exact) @ columns
                torch.testing.assert_close(piece.multiply(columns), product, rtol=0, atol=1e-12)
    assert seen == (list(range(9))[::-1] if adjoint else list(range(9)))


def test_the_state_may_be_a_tuple_and_the_map_may_be_driven():
    drive = normal(8, 3, 4, seed=5)
    step = lambda state, u: (torch.tanh(state[0] + u), 0.5 * state[1] + state[0].sum(1, keepdim=True))  # noqa: E731
    flow = iterate(step, (normal(3, 4), normal(3, 1)), 8, inputs=drive)
    state = (normal(3, 4), normal(3, 1))
    for u in drive:
        state = step(state, u)
    torch.testing.assert_close(flow.output[0], state[0], rtol=0, atol=0)
    torch.testing.assert_close(flow.output[1], state[1], rtol=0, atol=0)
    assert flow.states[0].size == 5


def test_the_whole_batch_as_one_state():
    flow = iterate(lambda x: torch.tanh(x - x.mean(0)), normal(3, 2), 5, batch_dim=None)
    assert (flow.batch, flow.space.size) == (1, 6)
    exact = jacobian(lambda x: torch.tanh(x - x.mean(0)), normal(3, 2)).reshape(6, 6)
    piece = next(iter(flow.tangents(6)))
    torch.testing.assert_close(piece.dense[0, 0], exact, rtol=0, atol=1e-12)


def test_depth_with_tied_weights_is_an_iterated_module():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().eval()
    x = normal(2, 3, 8)
    flow = iterate(layer, x, 6)

    class Universal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = self.layer(x)
            return x

    traced = stabkit.trace(Universal().eval(), x)
    assert len(traced) == 6
    a, b = (stabkit.lyapunov_spectrum(f, 4, direction="forward", discard=0) for f in (flow, traced))
    torch.testing.assert_close(a.exponents, b.exponents, rtol=0, atol=1e-8)


def test_a_module_is_afterwards_as_it_was():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    flow = iterate(module, normal(2, 3), 20)
    stabkit.lyapunov_spectrum(flow)
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_float32_and_length_beyond_one_window():
    flow = iterate(henon, (0.1 * normal(2, 2)).float(), 5000)
    assert flow.states[5000].tensors[0].dtype == torch.float32
    assert stabkit.lyapunov_spectrum(flow).local_growth.shape == (5000, 2, 2)


def test_long_runs_hold_few_states():
    flow = iterate(henon, 0.1 * normal(2, 2), 20_000)
    for _ in flow.tangents(2, adjoint=True):
        pass
    assert len(flow._kept) < 200


X = normal(4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iterate(3, X, 5), "step_fn=3 is an int; expected a function"),
        (lambda: iterate(henon, X, 0), "n_steps=0"),
        (lambda: iterate(henon, X.long(), 5), "floating point"),
        (lambda: iterate(henon, "x", 5), "x0 is a str"),
        (lambda: iterate(henon, X[0], 5), "any number of samples"),
        (lambda: iterate(lambda x: x.sum(1), X, 5), r"from float64\[4, 2\] to float64\[4\]"),
        (lambda: iterate(lambda x: x.mul_(0.5), X, 5), "writes into its argument"),
        (lambda: iterate(lambda x: x.detach() * 2, X, 5), "does not depend differentiably"),
        (lambda: iterate(lambda x: x.detach().numpy(), X, 5), "what step_fn returned is a ndarray; expected a tensor"),
        (lambda: iterate(lambda x: None, X, 5), "what step_fn returned is a NoneType"),
        (lambda: iterate(lambda x: x - x.mean(0), X, 5), "influence each other"),
        (lambda: iterate(lambda x: x + torch.randn_like(x), X, 5), "draws random numbers"),
        (lambda: iterate(henon, X, 5, step_size=0.0), "step_size=0.0"),
        (lambda: iterate(henon, X, 5, batch_dim=1), "batch_dim=1"),
        (lambda: iterate(lambda x, u: x + u, X, 5, inputs=X), "5 steps"),
        (lambda: iterate(lambda x, u: x + u, X, 4, inputs=X), "4 samples"),
        (lambda: iterate(lambda x: x**3, 9 * torch.ones(1, 1), 50).output, "sample 0 is not finite after step"),
        (lambda: iterate(henon, X, 5).jacobian(3, 3), "start=3, stop=3"),
    ],
)
def test_what_is_no_map_is_an_error(make, message):
    with pytest.raises(StabkitError, match=message):
        make()


def test_a_wrong_second_derivative_is_not_used():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return (grad.detach() + 0 * grad) * x.cos()

    flow = iterate(Wrong.apply, normal(1, 70), 12)
    with pytest.raises(TraceError, match="direction='adjoint'"):
        stabkit.lyapunov_spectrum(flow, 2)
    assert stabkit.lyapunov_spectrum(flow, 2, direction="adjoint").exponents.isfinite().all()
