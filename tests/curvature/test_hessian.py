"""Eigenvalues against the whole matrix, made by ``torch.autograd.functional`` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.curvature import sharpness


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), (6, 3)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)),
        (6, 2, 4, 4),
    ),
    "attention": (Attention, (6, 5, 3 + 1)),
    "recurrent": (Recurrent, (6, 5, 3)),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model = build().double()
    return model, torch.randn(shape, dtype=torch.float64), torch.randint(3, (shape[0],))


def dense(model, x, loss):
    """The whole Hessian, by a second route."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def value(flat):
        parts = flat.split([s.numel() for s in shapes.values()])
        named = {name: part.view(s) for part, (name, s) in zip(parts, shapes.items(), strict=True)}
        state = {**named, **{n: b.clone() for n, b in buffers.items()}}
        torch.manual_seed(0)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss(torch.func.functional_call(model, state, (x,)))

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(value, flat).numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_largest_eigenvalues_are_those_of_the_whole_matrix(name, seed):
    model, x, y = made(name, seed)
    loss = lambda out: functional.cross_entropy(out, y)  # noqa: E731
    truth = np.linalg.eigvalsh(dense(model, x, loss))[::-1]
    found = sharpness(model, x, loss=loss, k=4, tol=1e-9)
    assert found.converged.all()
    assert found.values == pytest.approx(truth[:4], rel=1e-6)
    assert found.lowest >= truth[-1] - 1e-9
    assert abs(found.lowest - truth[-1]) <= found.lowest_residual + 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_residuals_bound_the_error_at_any_tolerance(name):
    model, x, y = made(name)
    loss = lambda out: functional.cross_entropy(out, y)  # noqa: E731
    truth = np.linalg.eigvalsh(dense(model, x, loss))[::-1]
    for tol in (0.3, 1e-1, 1e-2):
        found = sharpness(model, x, loss=loss, tol=tol)
        assert np.abs(truth - found.values[0]).min() <= found.residuals[0] * (1 + 1e-9)


def test_shares_and_parts_are_those_of_the_eigenvector():
    model, x, y = made("mlp")
    loss = lambda out: functional.cross_entropy(out, y)  # noqa: E731
    H = dense(model, x, loss)
    _, vectors = np.linalg.eigh(H)
    found = sharpness(model, x, loss=loss, tol=1e-13, own=2)
    first = 3 * 8 + 8
    share = {block.name: block.share for block in found.by_block}
    assert share["0"] == pytest.approx((vectors[:first, -1] ** 2).sum(), abs=1e-6)
    assert sum(share.values()) == pytest.approx(1.0)
    own = {block.name: block.sharpness for block in found.by_block}
    assert own["0"] == pytest.approx(np.linalg.eigvalsh(H[:first, :first])[-1], rel=1e-2)
    assert own["2"] == pytest.approx(np.linalg.eigvalsh(H[first:, first:])[-1], rel=1e-2)


def test_the_gauss_newton_part_is_that_of_the_whole_matrices():
    model, x, y = made("mlp")
    found = sharpness(model, x, loss=lambda out: functional.cross_entropy(out, y), tol=1e-9)
    v = found.vector.numpy()
    shapes = [p.shape for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]

    def output(flat):
        parts = flat.split([s.numel() for s in shapes])
        return torch.func.functional_call(
            model, {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}, (x,)
        )

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    J = torch.autograd.functional.jacobian(output, flat).reshape(18, -1).numpy()
    inner = torch.autograd.functional.hessian(
        lambda o: functional.cross_entropy(o.view(6, 3), y), output(flat).reshape(-1)
    )
    assert found.gauss_newton[0] == pytest.approx(v @ J.T @ inner.numpy() @ J @ v, rel=1e-9)


def test_batches_are_the_mean_over_samples():
    model, x, y = made("mlp")
    whole = sharpness(model, x, loss=lambda out: functional.cross_entropy(out, y), tol=1e-9)
    parts = [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]
    found = sharpness(model, batches=parts, loss=functional.cross_entropy, tol=1e-9)
    assert found.values[0] == pytest.approx(whole.values[0], rel=1e-9)
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    assert found.gauss_newton[0] == pytest.approx(whole.gauss_newton[0], rel=1e-6)
    low, high = found.interval
    assert low < high


def test_copies_of_an_eigenvalue_are_found():
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.randn(40, dtype=torch.float64))

        def forward(self, x):
            return self.theta * x

    curvature = torch.tensor([5.0, 5.0, 5.0, 3.0] + [1.0] * 36, dtype=torch.float64)
    loss = lambda out: (curvature * out.square()).sum() / 2  # noqa: E731
    found = sharpness(Bowl(), torch.ones(40).double(), loss=loss, k=4)
    assert found.values == pytest.approx([5.0, 5.0, 5.0, 3.0], rel=1e-6)


def test_nothing_of_the_model_or_the_optimizer_is_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.randn(16, 4), torch.randint(2, (16,))
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    random = torch.get_rng_state()
    first = sharpness(model, x, loss=lambda out: functional.cross_entropy(out, y), optimizer=optimizer)
    second = sharpness(model, x, loss=lambda out: functional.cross_entropy(out, y), optimizer=optimizer)
    assert first.values.tolist() == second.values.tolist()
    assert first.preconditioned.tolist() == second.preconditioned.tolist()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    for p, kept in zip(model.parameters(), state, strict=True):
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in kept.items())
