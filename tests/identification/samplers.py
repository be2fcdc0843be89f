"""Samplers and solvers as loops in a forward, in the idiom of their repositories."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 6
Field = Callable[[Tensor, float], Tensor]


class Net(nn.Module):
    """A network with a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.time, self.b = nn.Linear(WIDTH, 16), nn.Linear(1, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(1, 1)
        return self.b(nn.functional.silu(self.a(x) + self.time(t)))


class Beside(nn.Module):
    """A network whose time is put beside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH + 1, 16), nn.SiLU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.net(torch.cat([x, torch.full_like(x[:, :1], float(t))], 1))


class Preconditioned(nn.Module):
    """The denoiser of Karras et al. 2022, with its own skip."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        data = 0.5
        c_skip = data**2 / (sigma**2 + data**2)
        c_out, c_in = sigma * data / (sigma**2 + data**2).sqrt(), 1 / (data**2 + sigma**2).sqrt()
        return c_skip * x + c_out * self.model(c_in * x, sigma.log() / 4)


class Conditioned(nn.Module):
    """A network that is told a class besides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, t: Any, c: Tensor) -> Tensor:
        return self.b(nn.functional.silu(self.a(x) + self.c(c) + float(t)))


class Loop(nn.Module):
    """Rounds of a step.

    Args:
        step: from the module, the state and the number of the round, the new state.
        net: the field, or a part of it.
        rounds: how many.
    """

    def __init__(self, step: Callable[..., Any], net: Callable[[], nn.Module] = Net, rounds: int = 4) -> None:
        super().__init__()
        self.net, self.step, self.rounds = net(), step, rounds

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.rounds):
            x = self.step(self, x, i)
        return x


H = 0.1


def heun(f: Field, x: Tensor, t: float, h: float = H) -> Tensor:
    """x' = x + h/2 (k1 + k2)."""
    k1 = f(x, t)
    k2 = f(x + h * k1, t + h)
    return x + h / 2 * (k1 + k2)


def midpoint(f: Field, x: Tensor, t: float, h: float = H) -> Tensor:
    """x' = x + h f(x + h/2 f(x))."""
    return x + h * f(x + h / 2 * f(x, t), t + h / 2)


def rk4(f: Field, x: Tensor, t: float, h: float = H) -> Tensor:
    """The classical method."""
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


FIELDS: dict[str, Callable[[Any], Field]] = {
    "time": lambda m: lambda x, t: m.net(x, t),
    "source": lambda m: lambda x, t: m.net(x, 0.0) + math.sin(t + 1),
    "damped": lambda m: lambda x, t: m.net(x, t) - 0.5 * x,
    "damped more and more": lambda m: lambda x, t: m.net(x, t) - (1 + t) * x,
    "scaled": lambda m: lambda x, t: math.cos(t) * m.net(x, 0.0),
}


def sigmas(n: int) -> Tensor:
    """Noise levels of Karras et al. 2022, without the last, zero."""
    i = torch.arange(n, dtype=torch.float64) / (n - 1)
    return (10 ** (1 / 7) + i * (0.01 ** (1 / 7) - 10 ** (1 / 7))) ** 7


def edm_heun(m: Loop, x: Tensor, i: int, noise: float = 0.0) -> Tensor:
    """Karras et al. 2022, algorithm 2; with churn where there is noise."""
    t = sigmas(m.rounds + 1)
    t_hat, t_next = t[i] * (1 + noise), t[i + 1]
    if noise:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        x = x + (t_hat**2 - t[i] ** 2).sqrt() * drawn
    d_cur = (x - m.net(x, t_hat)) / t_hat
    x_next = x + (t_next - t_hat) * d_cur
    d_prime = (x_next - m.net(x_next, t_next)) / t_next
    return x + (t_next - t_hat) * (0.5 * d_cur + 0.5 * d_prime)


def ddim(m: Loop, x: Tensor, i: int) -> Tensor:
    """One evaluation of the noise a step."""
    alpha, sigma = (torch.linspace(a, b, m.rounds + 1, dtype=x.dtype) for a, b in ((0.5, 0.99), (0.87, 0.14)))
    noise = m.net(x, i / m.rounds)
    return alpha[i + 1] * (x - sigma[i] * noise) / alpha[i] + sigma[i + 1] * noise


def dpm_solver_2s(m: Loop, x: Tensor, i: int) -> Tensor:
    """Lu et al. 2022, the singlestep method of order 2."""
    lam = torch.linspace(-2, 2, 2 * m.rounds + 1, dtype=x.dtype)
    a, s = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    now, mid, then = 2 * i, 2 * i + 1, 2 * i + 2
    h = lam[then] - lam[now]
    u = a[mid] / a[now] * x - s[mid] * torch.expm1(h / 2) * m.net(x, lam[now])
    return a[then] / a[now] * x - s[then] * torch.expm1(h) * m.net(u, lam[mid])


def sde_heun(m: Loop, x: Tensor, i: int) -> Tensor:
    """Heun for a stochastic equation with additive noise."""
    dw = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype) * H**0.5
    k1 = m.net(x, i * H) - x
    guess = x + H * k1 + 0.3 * dw
    return x + H / 2 * (k1 + m.net(guess, i * H + H) - guess) + 0.3 * dw


class Leapfrog(nn.Module):
    """Velocity Verlet, kick, drift, kick."""

    def __init__(self, friction: float = 0.0, source: bool = False, rounds: int = 4) -> None:
        super().__init__()
        self.net, self.friction, self.source, self.rounds = Net(), friction, source, rounds

    def forward(self, q: Tensor) -> Tensor:
        p = 0.5 * q
        for i in range(self.rounds):
            p = p + H / 2 * self.force(q, p, i)
            q = q + H * p
            p = p + H / 2 * self.force(q, p, i + 1)
        return q

    def force(self, q: Tensor, p: Tensor, i: int) -> Tensor:
        """Of a potential, with a source, less a friction."""
        force = self.net(q, 0.0) + (math.sin(i) if self.source else 0.0)
        return force - self.friction * p if self.friction else force


class Adams(nn.Module):
    """Adams-Bashforth with a start of lower order.

    Args:
        weights: of the last values of the field, the newest first.
        field: its kind.
    """

    def __init__(self, weights: tuple[float, ...], field: str, rounds: int = 6) -> None:
        super().__init__()
        self.net, self.weights, self.field, self.rounds = Net(), weights, field, rounds

    def forward(self, x: Tensor) -> Tensor:
        f = FIELDS[self.field](self)
        before: list[Tensor] = []
        for i in range(self.rounds):
            now = f(x, i * H)
            if len(before) < len(self.weights) - 1:
                x = x + H * now
            else:
                total = self.weights[0] * now
                for weight, old in zip(self.weights[1:], before, strict=True):
                    total = total + weight * old
                x = x + H * total
            before = [now, *before][: len(self.weights) - 1]
        return x


class LMS(nn.Module):
    """Adams-Bashforth on noise levels, which fall: steps of negative size."""

    def __init__(self, rounds: int = 8) -> None:
        super().__init__()
        self.net, self.rounds = Net(), rounds

    def forward(self, x: Tensor) -> Tensor:
        sigma, before = sigmas(self.rounds + 1), list[Tensor]()
        for i in range(self.rounds):
            before = [(x - self.net(x, sigma[i])) / sigma[i], *before][:3]
            weights = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12))[len(before) - 1]
            x = x + (sigma[i + 1] - sigma[i]) * sum(w * d for w, d in zip(weights, before, strict=True))
        return x


class DPMSolverPlusPlus(nn.Module):
    """The 2M sampler of k-diffusion."""

    def __init__(self, rounds: int = 6) -> None:
        super().__init__()
        self.net, self.rounds = Net(), rounds

    @property
    def lam(self) -> Tensor:
        """Logarithms of the noise levels, with their sign changed."""
        return -sigmas(self.rounds + 1).log()

    def forward(self, x: Tensor) -> Tensor:
        t, old = self.lam, None
        for i in range(self.rounds):
            denoised = self.net(x, t[i])
            h = t[i + 1] - t[i]
            used = denoised
            if old is not None:
                r = (t[i] - t[i - 1]) / h
                used = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
            x = (t[i] - t[i + 1]).exp() * x - (-h).expm1() * used
            old = denoised
        return x


class WithInput(nn.Module):
    """A loop whose field reads a function of the input beside the state.

    Args:
        kind: ``"condition"`` (the network reads it), ``"source"`` (it is added to the field), ``"damped source"`` or
            ``"drive"`` (the source is another one at every time).
        step: of the solver.
        begins: whether the state begins at a constant, so that the first round is shorter than the others.
    """

    def __init__(self, kind: str, step: Callable[..., Tensor], begins: bool, rounds: int = 4) -> None:
        super().__init__()
        self.net = Conditioned() if kind == "condition" else Net()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.kind, self.step, self.begins, self.rounds = kind, step, begins, rounds

    def forward(self, y: Tensor) -> Tensor:
        c = self.encoder(y)
        x = torch.full_like(c, 0.3) if self.begins else 0.3 + y
        for i in range(self.rounds):
            x = self.step(lambda x, t: self.field(x, t, c), x, i * H)
        return x

    def field(self, x: Tensor, t: float, c: Tensor) -> Tensor:
        """What is integrated."""
        if self.kind == "condition":
            return self.net(x, t, c)
        source = math.cos(t) * c if self.kind == "drive" else c
        field = self.net(x, t) + source
        return field - x if self.kind == "damped source" else field


class PredictorCorrector(nn.Module):
    """Adams-Bashforth predicts, the trapezoid rule corrects."""

    def __init__(self, rounds: int = 5) -> None:
        super().__init__()
        self.net, self.rounds = Net(), rounds

    def forward(self, x: Tensor) -> Tensor:
        old = self.net(x, 0.0)
        x = x + H * old
        for i in range(1, self.rounds + 1):
            now = self.net(x, i * H)
            guess = x + H * (1.5 * now - 0.5 * old)
            x = x + H / 2 * (now + self.net(guess, i * H + H))
            old = now
        return x


class PCBlock(nn.Module):
    """PCformer (Li et al. 2024): two stages predict, moving averages of them and of older values correct."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.gamma, self.alpha = nn.Parameter(torch.tensor(0.6)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, history: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        first = self.net(x)
        second = self.net(x + first)
        predicted = self.net(x + self.gamma * second + self.gamma * (1 - self.gamma) * first)
        x = x + self.alpha * predicted
        for age, old in enumerate(history, 1):
            x = x + self.alpha * (1 - self.alpha) ** age * old
        return x, [predicted, *history][:2]


class PCFormer(nn.Module):
    """Such blocks, each with the history of those before."""

    def __init__(self, depth: int = 7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PCBlock() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        history: list[Tensor] = []
        for block in self.blocks:
            x, history = block(x, history)
        return x


class Ista(nn.Module):
    """The sparsifying half of a block of CRATE (Yu et al. 2023): a proximal gradient step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        decoded = nn.functional.linear(x, self.weight)
        back = nn.functional.linear(x, self.weight.t()) - nn.functional.linear(decoded, self.weight.t())
        return nn.functional.relu(x + 0.1 * back - 0.1 * 0.1)
