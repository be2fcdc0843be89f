"""Hand-made architectures of the hard cases: wide state spaces, recurrence, solvers and fixed points."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from .hard_models import Residual

# ---------------------------------------------------------------- state spaces wider than one tensor


class Reversible(nn.Module):
    """Gomez et al. 2017, arXiv:1707.04585: a pair of streams."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"f": Residual(3), "g": Residual(3)}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for block in self.blocks:
            a = a + block["f"](b)
            b = b + block["g"](a)
        return torch.cat([a, b], dim=1)


class CouplingBlock(nn.Module):
    """One reversible block as a module that takes and returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = pair
        a = a + self.f(b).tanh()
        return a, b + self.g(a).tanh()


class RevNet(nn.Module):
    """Reversible blocks that pass a pair along."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(CouplingBlock() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat(self.blocks((a, b)), dim=1)


class Momentum(nn.Module):
    """Sander et al. 2021, arXiv:2102.07870: position and velocity."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for layer in self.layers:
            v = 0.9 * v + 0.1 * layer(x).tanh()
            x = x + v
        return x


class Midpoint(nn.Module):
    """The explicit two-step midpoint rule (leapfrog), Chang et al. 2018, arXiv:1709.03698."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        before, now = x, x
        for layer in self.layers:
            before, now = now, before + 0.2 * layer(now).tanh()
        return now


class Dense(nn.Module):
    """Every layer reads all the features before it."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4 + 3 * i, 3, 3, padding=1) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x.relu())], dim=1)
        return x


class UNet(nn.Module):
    """Three levels down, a bottom, three levels up, with long skips."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [2, 4, 6, 8]
        self.down = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for m, n in itertools.pairwise(sizes))
        self.bottom = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 2, 1)])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x).relu()
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.bottom(x).relu()
        for layer in self.up:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear")
            x = layer(torch.cat([x, skips.pop()], dim=1)).tanh()
        return x


# ---------------------------------------------------------------- recurrence, solvers, fixed points


class CellLoop(nn.Module):
    """One cell called over time by a Python loop."""

    def __init__(self, cell: nn.Module, size: int = 5) -> None:
        super().__init__()
        self.cell = cell
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.size)
        state = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        outputs = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, dim=1)


class Field(nn.Module):
    """The right-hand side of an ordinary differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t)


class NeuralODE(nn.Module):
    """torchdiffeq over five equal intervals."""

    def __init__(self, method: str, adjoint: bool = False) -> None:
        super().__init__()
        self.field = Field()
        self.method = method
        self.adjoint = adjoint

    def forward(self, x: Tensor) -> Tensor:
        import torchdiffeq

        solve = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        times = torch.linspace(0, 1, 6, dtype=x.dtype)
        return solve(self.field, x, times, method=self.method, rtol=1e-8, atol=1e-10)[-1]


class Hamiltonian(nn.Module):
    """Symplectic Euler with forces by autograd inside the forward pass."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.depth = depth

    def force(self, q: Tensor) -> Tensor:
        with torch.enable_grad():
            q = q if q.requires_grad else q.requires_grad_()
            return torch.autograd.grad(self.energy(q).sum(), q, create_graph=True)[0]

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.chunk(2, dim=1)
        for _ in range(self.depth):
            p = p - 0.1 * self.force(q)
            q = q + 0.1 * p
        return torch.cat([q, p], dim=1)


class Equilibrium(nn.Module):
    """A fixed point whose backward solves the adjoint equation in a hook (Bai et al. 2019, arXiv:1909.01377)."""

    def __init__(self, hook: bool) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(4, 6), nn.Linear(6, 6)
        self.hook = hook

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.inner(z) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.step(z, x)
        z = self.step(z, x)
        if self.hook and torch.is_grad_enabled():
            start = z.clone().detach().requires_grad_()
            again = self.step(start, x.detach())

            def implicit(grad: Tensor) -> Tensor:
                total = grad
                for _ in range(60):
                    total = torch.autograd.grad(again, start, total, retain_graph=True)[0] + grad
                return total

            z.register_hook(implicit)
        return z
