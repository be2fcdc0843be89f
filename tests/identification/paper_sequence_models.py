"""Recurrent networks, state-space models and solvers as their papers' repositories write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .paper import Iterated, Paper, Repeated, block, mlp

H, IN = 6, 3


def sequence() -> Tensor:
    return torch.randn(2, 5, IN)


def vectors() -> Tensor:
    return torch.randn(2, H)


class Loop(nn.Module):
    """A cell called over time inside one forward pass."""

    def __init__(self, cell: nn.Module, states: int = 1) -> None:
        super().__init__()
        self.cell, self.states = cell, states

    def forward(self, x: Tensor) -> Tensor:
        state: Any = tuple(x.new_zeros(len(x), H) for _ in range(self.states))
        state = state if self.states > 1 else state[0]
        for t in range(x.shape[1]):
            state = self.cell(state, x[:, t])
        return state[0] if self.states > 1 else state


def wide(d: int) -> nn.Module:
    return nn.Linear(d + IN, d)


def into(d: int) -> nn.Module:
    return nn.Linear(IN, d)


def own(d: int) -> nn.Module:
    return nn.Linear(d, d)


def gru(_: int) -> nn.Module:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(IN, H)

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return self.cell(x, h)

    return Cell()


def cornn(m: Any, s: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = s
    z = z + 0.1 * (torch.tanh(m.parts[0](torch.cat([y, z, x], 1))) - 1.5 * y - 0.8 * z)
    return y + 0.1 * z, z


def unicornn(m: Any, s: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = s
    dt = 0.2 * torch.sigmoid(m.c)
    z = z - dt * (torch.tanh(m.w * y + m.parts[0](x)) + 0.9 * y)
    return y + dt * z, z


def lem(m: Any, s: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = s
    g = torch.cat([y, x], 1)
    a, b = 0.5 * torch.sigmoid(m.parts[0](g)), 0.5 * torch.sigmoid(m.parts[1](g))
    z = (1 - a) * z + a * torch.tanh(m.parts[2](g))
    return (1 - b) * y + b * torch.tanh(m.parts[3](torch.cat([z, x], 1))), z


def lipschitz(m: Any, h: Tensor, x: Tensor) -> Tensor:
    A, W = (0.8 * (M - M.T) + 0.2 * (M + M.T) - 0.01 * torch.eye(H, dtype=h.dtype) for M in (m.M, m.N))
    return h + 0.1 * (h @ A.T + torch.tanh(h @ W.T + m.parts[0](x)))


def antisymmetric(m: Any, h: Tensor, x: Tensor) -> Tensor:
    return h + 0.1 * torch.tanh(h @ (m.W - m.W.T - 0.1 * torch.eye(H, dtype=h.dtype)).T + m.parts[0](x))


def leaky(m: Any, h: Tensor, x: Tensor) -> Tensor:
    return (1 - 0.2) * h + 0.2 * torch.tanh(m.parts[0](h) + m.parts[1](x))


def leaky_rate(m: Any, h: Tensor, x: Tensor) -> Tensor:
    return h + 0.2 * (-h + torch.tanh(h) @ m.W.T + m.parts[0](x))


def cfc(m: Any, h: Tensor, x: Tensor) -> Tensor:
    g = torch.cat([h, x], 1)
    t = torch.sigmoid(m.parts[0](g) + m.parts[1](g))
    return torch.tanh(m.parts[2](g)) * (1 - t) + t * torch.tanh(m.parts[3](g))


def ltc(m: Any, h: Tensor, x: Tensor) -> Tensor:
    f = torch.sigmoid(m.parts[0](h) + m.parts[1](x))
    return (h + 0.1 * f * m.A) / (1 + 0.1 * (1 / 1.5 + f))


class LRU(nn.Module):
    """Linear recurrent unit: diagonal complex recurrence and a feed-through D."""

    def __init__(self) -> None:
        super().__init__()
        self.nu, self.theta = nn.Parameter(torch.rand(H).log()), nn.Parameter(torch.rand(H))
        self.B, self.C, self.Dd = (nn.Parameter(torch.randn(s)) for s in ((H, IN), (IN, H), (IN,)))

    def forward(self, u: Tensor) -> Tensor:
        lam = torch.exp(torch.complex(-torch.exp(self.nu), self.theta))
        gamma = torch.sqrt(1 - lam.abs() ** 2)
        x, out = torch.zeros(len(u), H, dtype=lam.dtype), []
        for t in range(u.shape[1]):
            x = lam * x + gamma * (u[:, t] @ self.B.T)
            out.append((x @ self.C.T.to(lam.dtype)).real + self.Dd * u[:, t])
        return torch.stack(out, 1)


class S4Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A, self.B, self.log_dt = (
            nn.Parameter(v) for v in (torch.randn(H, H) / 3 - torch.eye(H), torch.randn(H, IN), torch.tensor(-1.0))
        )

    def forward(self, h: Tensor, u: Tensor) -> Tensor:
        dt, eye = self.log_dt.exp(), torch.eye(H, dtype=h.dtype)
        left = eye - dt / 2 * self.A
        Ab, Bb = torch.linalg.solve(left, eye + dt / 2 * self.A), torch.linalg.solve(left, dt * self.B)
        return h @ Ab.T + u @ Bb.T


class Mamba(nn.Module):
    """The reference selective scan, (batch, length, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.arange(1, 5.0)).repeat(IN, 1))
        self.Dd, self.x_proj, self.dt = (
            nn.Parameter(torch.ones(IN)),
            nn.Linear(IN, 9, bias=False),
            nn.Linear(1, IN),
        )

    def forward(self, u: Tensor) -> Tensor:
        delta, B, C = self.x_proj(u).split([1, 4, 4], -1)
        delta = functional.softplus(self.dt(delta))
        dA = torch.exp(torch.einsum("bld,dn->bldn", delta, -torch.exp(self.A_log)))
        dBu = torch.einsum("bld,bln,bld->bldn", delta, B, u)
        x, ys = torch.zeros(len(u), IN, 4, dtype=u.dtype), []
        for i in range(u.shape[1]):
            x = dA[:, i] * x + dBu[:, i]
            ys.append(torch.einsum("bdn,bn->bd", x, C[:, i]))
        return torch.stack(ys, 1) + u * self.Dd


class RetNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        S, out = torch.zeros(len(x), 4, 4, dtype=x.dtype), []
        for n in range(x.shape[1]):
            S = 0.9 * S + k[:, n, :, None] * v[:, n, None, :]
            out.append((q[:, n, None] @ S)[:, 0])
        return torch.stack(out, 1)


class DeltaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.b = (
            nn.Linear(IN, 4),
            nn.Linear(IN, 4),
            nn.Linear(IN, 4),
            nn.Linear(IN, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, beta = self.q(x), functional.normalize(self.k(x), dim=-1), self.v(x), torch.sigmoid(self.b(x))
        S, out = torch.zeros(len(x), 4, 4, dtype=x.dtype), []
        for n in range(x.shape[1]):
            old = (k[:, n, None] @ S)[:, 0]
            S = S + k[:, n, :, None] * (beta[:, n] * (v[:, n] - old))[:, None]
            out.append((q[:, n, None] @ S)[:, 0])
        return torch.stack(out, 1)


class ODENet(nn.Module):
    """odeint over an interval, the last time kept, then a layer; as in the examples of torchdiffeq."""

    def __init__(self, method: str, *, adjoint: bool = False, steps: int = 1, blocks: int = 2, **options: Any) -> None:
        super().__init__()
        self.fields = nn.ModuleList(mlp(H) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.Linear(H, H) for _ in range(blocks))
        self.method, self.adjoint, self.times, self.options = method, adjoint, steps + 1, options

    def forward(self, x: Tensor) -> Tensor:
        import torchdiffeq

        odeint = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        t = torch.linspace(0, 1, self.times, dtype=x.dtype)
        for f, norm in zip(self.fields, self.norms, strict=True):
            field = Autonomous(f)
            y = odeint(field, x, t, method=self.method, **self.options)
            x = norm(y[1] if self.times == 2 else y[-1])
        return x


class Autonomous(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, _t: Any, y: Tensor) -> Tensor:
        return self.f(y)


class OnlySolver(nn.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.field, self.method = Autonomous(mlp(H)), method

    def forward(self, x: Tensor) -> Tensor:
        import torchdiffeq

        t = torch.linspace(0, 1, 5, dtype=x.dtype)
        return torchdiffeq.odeint(self.field, x, t, method=self.method)[-1]


class NeuralCDE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.start = (
            nn.Sequential(nn.Linear(H, 16), nn.ReLU(), nn.Linear(16, H * IN), nn.Tanh()),
            nn.Linear(IN, H),
        )

    def forward(self, X: Tensor) -> Tensor:
        z = self.start(X[:, 0])
        for i in range(X.shape[1] - 1):
            z = z + (self.f(z).view(-1, H, IN) @ (X[:, i + 1] - X[:, i]).unsqueeze(-1)).squeeze(-1)
        return z


class HNN(nn.Module):
    """Leapfrog on a learned Hamiltonian H(q, p) = T(p) + V(q) with autograd inside."""

    def __init__(self) -> None:
        super().__init__()
        self.T, self.V = (nn.Sequential(nn.Linear(H // 2, 16), nn.Tanh(), nn.Linear(16, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.chunk(2, -1)
        dt = 0.2

        def force(net: nn.Module, y: Tensor) -> Tensor:
            return torch.autograd.grad(net(y).sum(), y, create_graph=True)[0]

        for _ in range(4):
            p = p - dt / 2 * force(self.V, q)
            q = q + dt * force(self.T, p)
            p = p - dt / 2 * force(self.V, q)
        return torch.cat([q, p], -1)


def van_der_pol(m: Any, y: Tensor) -> Tensor:
    def f(y: Tensor) -> Tensor:
        a, b = y[..., 0], y[..., 1]
        return torch.stack([b, m.mu * (1 - a**2) * b - a], dim=-1)

    h = 0.1
    k1 = f(y)
    k2 = f(y + h / 2 * k1)
    k3 = f(y + h / 2 * k2)
    k4 = f(y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class LotkaVolterra(nn.Module):
    def forward(self, s: Any, _u: Tensor) -> Any:
        def f(s: Tensor) -> Tensor:
            x, y = s.unbind(-1)
            return torch.stack([1.1 * x - 0.4 * x * y, 0.1 * x * y - 0.4 * y], -1)

        h = 0.1
        k1 = f(s)
        k2 = f(s + h / 2 * k1)
        k3 = f(s + h / 2 * k2)
        k4 = f(s + h * k3)
        return s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def over(cell: Any, states: int = 1) -> Any:
    return Repeated(lambda: Loop(cell(), states), sequence, 1)


CELLS = {
    "antisymmetric RNN": (block(antisymmetric, into, width=H, W=(H, H)), 1, r"forward Euler$", 0.1),
    "coRNN": (block(cornn, lambda d: nn.Linear(2 * d + IN, d), width=H), 2, r"oscillator.*coRNN", None),
    "UnICORNN": (block(unicornn, into, width=H, c=(H,), w=(H,)), 2, r"oscillator.*UnICORNN", None),
    "LEM": (block(lem, wide, wide, wide, wide, width=H), 2, r"LEM", None),
    "LipschitzRNN": (block(lipschitz, into, width=H, M=(H, H), N=(H, H)), 1, r"forward Euler", 0.1),
    "leaky RNN": (block(leaky, own, into, width=H), 1, r"damped Euler \(a = 0\.8", 0.2),
    "leaky RNN, rates": (block(leaky_rate, into, width=H, W=(H, H)), 1, r"damped Euler \(a = 0\.8", 0.2),
    "CfC": (block(cfc, wide, wide, wide, wide, width=H), 1, r"gated|plain", None),
    "LTC": (block(ltc, own, into, width=H, A=(H,)), 1, r"gated|semi-implicit", None),
}

ROWS = (
    *(Paper(name, over(cell, states), right, h=h) for name, (cell, states, right, h) in CELLS.items()),
    *(
        Paper(f"{name}, iterated", Iterated(cell, states), right, h=h)
        for name, (cell, states, right, h) in CELLS.items()
        if name in ("coRNN", "LEM", "LTC")
    ),
    Paper("GRUCell loop", over(lambda: gru(0)), r"gated Euler"),
    Paper("S4 bilinear", over(S4Bilinear), r"plain|trapezoid|bilinear|linear recurrence"),
    Paper("LRU", Repeated(LRU, sequence, 1), r"linear recurrence", r"diagonal skip"),
    Paper("LRU, time first", Repeated(LRU, sequence, 1, batch_dim=None), r"linear recurrence", r"diagonal skip"),
    Paper(
        "Mamba scan",
        Repeated(Mamba, sequence, 1, batch_dim=None),
        r"exponential step|linear recurrence",
        r"forward Euler",
    ),
    Paper("RetNet", Repeated(RetNet, sequence, 1), r"damped|linear recurrence"),
    Paper("DeltaNet", Repeated(DeltaNet, sequence, 1), r"forward Euler"),
    Paper("ODENet euler", Repeated(lambda: ODENet("euler"), vectors, 1), r"forward Euler$", which=0),
    Paper("ODENet rk4", Repeated(lambda: ODENet("rk4"), vectors, 1), r"rk4|three_eighths", which=0),
    Paper("ODENet dopri5", Repeated(lambda: ODENet("dopri5"), vectors, 1), r"dopri5|adaptive", which=0),
    Paper(
        "ODENet bosh3",
        Repeated(lambda: ODENet("bosh3", rtol=1e-5, atol=1e-6), vectors, 1),
        r"bosh3|ralston3",  # the numbers of the first step, whose value at its end the next one begins with, are both
        which=0,
    ),
    Paper("ODENet adams", Repeated(lambda: ODENet("explicit_adams"), vectors, 1), r"ab|adams|three_eighths", which=0),
    Paper(
        "ODENet adjoint",
        Repeated(lambda: ODENet("rk4", adjoint=True), vectors, 1),
        r"rk4|three_eighths|unknown",
        which=0,
    ),
    Paper("torchdiffeq midpoint", Repeated(lambda: OnlySolver("midpoint"), vectors, 1), r"midpoint"),
    Paper("Neural CDE", Repeated(NeuralCDE, sequence, 1), r"forward Euler"),
    Paper("HNN leapfrog", Repeated(HNN, vectors, 1), r"verlet", r"symplectic Euler"),
    Paper("van der Pol RK4", Repeated(block(van_der_pol, mu=1.5), lambda: torch.randn(2, 2)), r"rk4", h=0.1),
    Paper("Lotka-Volterra RK4", Iterated(LotkaVolterra, 1, 2), r"rk4", h=0.1),
)
