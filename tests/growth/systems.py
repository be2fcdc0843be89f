"""Maps with known exponents, and networks whose exponents are exact at finite width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabkit.tracing import Iteration, iterate

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def linear(A: Tensor, steps: int, batch: int = 1) -> Iteration:
    return iterate(lambda x: x @ A.T, torch.zeros(batch, len(A), dtype=DOUBLE), steps)


def jordan(steps: int) -> Iteration:
    return linear(torch.tensor([[0.9, 1.0], [0.0, 0.9]], dtype=DOUBLE), steps)


def cat_map(steps: int) -> Iteration:
    A = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=DOUBLE)
    return iterate(lambda x: (x @ A.T) % 1, torch.rand(2, 2, generator=generator(), dtype=DOUBLE), steps)


def logistic(steps: int, batch: int) -> Iteration:
    """Started on the invariant density of x -> 4 x (1 - x)."""
    start = torch.sin(math.pi / 2 * torch.rand(batch, 1, generator=generator(), dtype=DOUBLE)) ** 2
    return iterate(lambda x: 4 * x * (1 - x), start, steps)


def henon_step(x: Tensor) -> Tensor:
    return torch.stack([1 - 1.4 * x[:, 0] ** 2 + x[:, 1], 0.3 * x[:, 0]], 1)


def henon(steps: int, batch: int) -> Iteration:
    return iterate(henon_step, 0.1 * torch.rand(batch, 2, generator=generator(), dtype=DOUBLE), steps)


def lorenz_field(u: Tensor) -> Tensor:
    x, y, z = u.unbind(1)
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)


def lorenz_step(u: Tensor, h: float = 0.01) -> Tensor:
    """One step of the classical Runge-Kutta method."""
    a = lorenz_field(u)
    b = lorenz_field(u + h / 2 * a)
    c = lorenz_field(u + h / 2 * b)
    d = lorenz_field(u + h * c)
    return u + h / 6 * (a + 2 * b + 2 * c + d)


def lorenz(steps: int, batch: int, h: float = 0.01) -> Iteration:
    start = normal(batch, 3) + torch.tensor([0.0, 0.0, 25.0], dtype=DOUBLE)
    return iterate(lambda u: lorenz_step(u, h), start, steps, step_size=h)


def matrices(steps: int, batch: int, width: int, scale: float, seed: int) -> Tensor:
    return normal(steps, batch, width, width, seed=seed) * (scale / math.sqrt(width))


def apply(W: Tensor, x: Tensor) -> Tensor:
    return (W @ x.unsqueeze(-1)).squeeze(-1)


def gaussian_layers(steps: int, width: int = 8, batch: int = 1, seed: int = 0) -> Iteration:
    W = matrices(steps, batch, width, 1.0, seed)
    return iterate(lambda x, w: apply(w, x), torch.zeros(batch, width, dtype=DOUBLE), steps, inputs=W)


def gaussian_exponents(width: int = 8) -> Tensor:
    k = torch.arange(1, width + 1, dtype=DOUBLE)
    return 0.5 * (math.log(2 / width) + torch.special.digamma((width - k + 1) / 2))


def orthogonal_layers(steps: int, width: int, scale: float) -> Iteration:
    Q, R = torch.linalg.qr(normal(steps, 1, width, width))
    W = scale * Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return iterate(lambda x, w: apply(w, x), torch.zeros(1, width, dtype=DOUBLE), steps, inputs=W)


def relu_layers(steps: int, width: int = 32, batch: int = 1, seed: int = 0) -> Iteration:
    W = matrices(steps, batch, width, math.sqrt(2), seed)
    start = normal(batch, width, seed=seed + 1)
    return iterate(lambda x, w: torch.relu(apply(w, x)), start, steps, inputs=W)


def relu_exponent(width: int = 32) -> float:
    terms = [
        math.comb(width, K)
        * 2.0**-width
        * 0.5
        * (math.log(4 / width) + float(torch.special.digamma(torch.tensor(K / 2, dtype=DOUBLE))))
        for K in range(1, width + 1)
    ]
    return sum(terms)


def untied_residual(steps: int, width: int = 32, h: float = 0.5, batch: int = 1, seed: int = 0) -> Iteration:
    W = matrices(steps, batch, width, 1.0, seed)
    return iterate(lambda x, w: x + h * apply(w, x), torch.zeros(batch, width, dtype=DOUBLE), steps, inputs=W)


def tied_residual(steps: int, width: int = 6, h: float = 0.5) -> tuple[Iteration, Tensor]:
    """The flow, and ln |1 + h eig(W)|, the largest first."""
    W = normal(width, width) / math.sqrt(width)
    exact = (1 + h * torch.linalg.eigvals(W)).abs().log().sort(descending=True).values
    return iterate(lambda x: x + h * x @ W.T, torch.zeros(1, width, dtype=DOUBLE), steps), exact


def random_network(steps: int, batch: int, width: int = 400, g: float = 2.0, seed: int = 0) -> Iteration:
    """The tied recurrent net x <- J tanh x."""
    J = (normal(width, width, seed=seed) * (g / math.sqrt(width))).float()
    return iterate(lambda x: torch.tanh(x) @ J.T, normal(batch, width, seed=seed + 1).float(), steps)
