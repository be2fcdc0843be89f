"""State-space layers as their papers' repositories run them over time, and the networks around a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 6


def network(make: Callable[[], nn.Module], **options: Any) -> Residual:
    """Two blocks with such layers, drawn with one seed."""
    torch.manual_seed(0)
    return Residual(make, **options)


class Mixer(nn.Module):
    """A layer over time, ``(batch, time, width)`` to the same."""

    def __init__(self, forward: Callable[..., Tensor], *parts: nn.Module, **named: Any) -> None:
        super().__init__()
        self.function, self.parts = forward, nn.ModuleList(parts)
        for name, value in named.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Residual(nn.Module):
    """Pre-norm blocks around layers over time, and a head on all outputs or on the last."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2, last: bool = False) -> None:
        super().__init__()
        self.stem, self.last = nn.Linear(3, WIDTH), last
        self.mixers = nn.ModuleList(make() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(norm, mixer) for norm, mixer in zip(self.norms, self.mixers, strict=True))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1] if self.last else x)


class Block(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


def linear(out: int, inner: int = WIDTH, bias: bool = True) -> nn.Module:
    return nn.Linear(inner, out, bias=bias)


def mamba() -> nn.Module:
    """The selective scan of the reference implementation, with its short convolution and its gate."""

    def forward(m: Any, x: Tensor) -> Tensor:
        length, n = x.shape[1], 4
        x, res = m.parts[0](x).transpose(1, 2).chunk(2, 1)
        x = functional.silu(m.parts[1](x)[:, :, :length])
        low = m.parts[2](x.transpose(1, 2))
        delta, B, C = low.split([2, n, n], -1)
        delta = functional.softplus(m.parts[3](delta))
        A = -torch.exp(m.A_log)
        dA = torch.exp(torch.einsum("bld,dn->bdln", delta, A))
        dBu = torch.einsum("bld,bln,bdl->bdln", delta, B, x)
        h, ys = torch.zeros(len(x), WIDTH, n, dtype=x.dtype), []
        for i in range(length):
            h = dA[:, :, i] * h + dBu[:, :, i]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, i, :]))
        y = torch.stack(ys, 2) + x * m.D[:, None]
        return m.parts[4]((y * functional.silu(res)).transpose(1, 2))

    conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
    A_log = torch.log(torch.arange(1, 5.0)).repeat(WIDTH, 1)
    return Mixer(forward, linear(2 * WIDTH), conv, linear(2 + 8), nn.Linear(2, WIDTH), linear(WIDTH),
                 A_log=A_log, D=torch.ones(WIDTH))  # fmt: skip


def mamba2_recurrent() -> nn.Module:
    """A scalar decay a head, and outer products."""

    def forward(m: Any, x: Tensor) -> Tensor:
        heads, p, n = 2, 3, 4
        b, length = x.shape[:2]
        u, B, C, dt = m.parts[0](x).split([WIDTH, n, n, heads], -1)
        dt = functional.softplus(dt + m.dt_bias)
        dA = torch.exp(dt * -torch.exp(m.A_log))
        u = u.reshape(b, length, heads, p)
        state, ys = x.new_zeros(b, heads, p, n), []
        for t in range(length):
            dBx = torch.einsum("bh,bn,bhp->bhpn", dt[:, t], B[:, t], u[:, t])
            state = state * dA[:, t][:, :, None, None] + dBx
            ys.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + m.D[:, None] * u[:, t])
        return m.parts[1](torch.stack(ys, 1).reshape(b, length, WIDTH))

    return Mixer(forward, linear(WIDTH + 8 + 2), linear(WIDTH), dt_bias=torch.zeros(2), A_log=torch.zeros(2),
                 D=torch.ones(2))  # fmt: skip


def mamba3() -> nn.Module:
    """Exponential-trapezoidal rule, and a rotation of B and C that depends on the data."""

    def forward(m: Any, x: Tensor) -> Tensor:
        n = 4
        b, length = x.shape[:2]
        u, B, C, dt, theta, lam = m.parts[0](x).split([WIDTH, n, n, 1, n // 2, 1], -1)
        dt, lam = functional.softplus(dt), torch.sigmoid(lam)
        alpha = torch.exp(-torch.exp(m.A_log) * dt)
        angle = torch.cumsum(dt * theta, 1)

        def rotated(v: Tensor) -> Tensor:
            first, second = v.chunk(2, -1)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

        B, C = rotated(B), rotated(C)
        Bx = B[..., None] * u[..., None, :]
        h, before, ys = x.new_zeros(b, n, WIDTH), x.new_zeros(b, n, WIDTH), []
        for t in range(length):
            a, d, g = alpha[:, t, :, None], dt[:, t, :, None], lam[:, t, :, None]
            h = a * h + (1 - g) * d * a * before + g * d * Bx[:, t]
            before = Bx[:, t]
            ys.append((C[:, t, :, None] * h).sum(1))
        return m.parts[1](torch.stack(ys, 1))

    return Mixer(forward, linear(WIDTH + 8 + 4), linear(WIDTH), A_log=torch.zeros(1))


def _diagonal(discretise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> nn.Module:
    """S4D with a complex diagonal, run as a recurrence."""

    def forward(m: Any, x: Tensor) -> Tensor:
        A = torch.complex(-torch.exp(m.log_real), m.imag)
        dt = torch.exp(m.log_dt)[:, None]
        dA, dB = discretise(dt * A, dt)
        C = torch.view_as_complex(m.C)
        h, ys = torch.zeros(len(x), WIDTH, 4, dtype=dA.dtype), []
        for u in x.unbind(1):
            h = dA * h + dB * u.unsqueeze(-1)
            ys.append(2 * torch.einsum("bhn,hn->bh", h, C).real + m.D * u)
        return m.parts[0](functional.gelu(torch.stack(ys, 1)))

    real, imag = torch.log(0.5 * torch.ones(WIDTH, 4)), torch.pi * torch.arange(4.0).repeat(WIDTH, 1)
    return Mixer(forward, linear(WIDTH), log_real=real, imag=imag, log_dt=torch.linspace(-5, -2, WIDTH),
                 C=torch.randn(WIDTH, 4, 2), D=torch.ones(WIDTH))  # fmt: skip


def titans() -> nn.Module:
    """A memory matrix that descends its error with momentum and weight decay (Behrouz, Zhong, Mirrokni, 2025)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v, gates = m.parts[0](x).split([WIDTH, WIDTH, WIDTH, 3], -1)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        eta, theta, alpha = (gates.sigmoid() * torch.tensor([1.0, 1.0, 0.2], dtype=x.dtype)).unbind(-1)
        memory = m.start.expand(len(x), WIDTH, WIDTH)
        surprise, ys = torch.zeros_like(memory), []
        for t in range(x.shape[1]):
            error = torch.einsum("bij,bj->bi", memory, k[:, t]) - v[:, t]
            descent = 2 * torch.einsum("bi,bj->bij", error, k[:, t])
            surprise = eta[:, t, None, None] * surprise - theta[:, t, None, None] * descent
            memory = (1 - alpha[:, t, None, None]) * memory + surprise
            ys.append(torch.einsum("bij,bj->bi", memory, q[:, t]))
        return m.parts[1](torch.stack(ys, 1))

    return Mixer(forward, linear(3 * WIDTH + 3), linear(WIDTH), start=torch.eye(WIDTH))


def s4d_zoh() -> nn.Module:
    return _diagonal(lambda z, dt: (torch.exp(z), (torch.exp(z) - 1) / z * dt))


def s4d_bilinear() -> nn.Module:
    return _diagonal(lambda z, dt: ((1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)))


def s4d_backward() -> nn.Module:
    return _diagonal(lambda z, dt: (1 / (1 - z), dt / (1 - z)))


def s4d_forward() -> nn.Module:
    return _diagonal(lambda z, dt: (1 + z, dt + 0 * z))


def s4d_real() -> nn.Module:
    """Real poles, and the zero-order hold."""

    def forward(m: Any, x: Tensor) -> Tensor:
        A, dt = -torch.exp(m.log_A), torch.exp(m.log_dt)[:, None]
        dA = torch.exp(dt * A)
        dB = (dA - 1.0) / A
        h, ys = x.new_zeros(len(x), WIDTH, 4), []
        for t in range(x.shape[1]):
            h = dA * h + dB * x[:, t, :, None]
            ys.append((h * m.C).sum(-1))
        return m.parts[0](functional.gelu(torch.stack(ys, 1)))

    return Mixer(forward, linear(WIDTH), log_A=torch.log(torch.arange(1.0, 5.0)).repeat(WIDTH, 1),
                 log_dt=torch.linspace(-3, -1, WIDTH), C=torch.randn(WIDTH, 4))  # fmt: skip


def s4_dense_bilinear() -> nn.Module:
    """A dense A, one for all channels, by solves with the trapezoidal rule."""

    def forward(m: Any, x: Tensor) -> Tensor:
        eye, dt = torch.eye(4, dtype=x.dtype), m.log_dt.exp()
        left = eye - dt / 2 * m.A
        Ab, Bb = torch.linalg.solve(left, eye + dt / 2 * m.A), torch.linalg.solve(left, dt * m.B)
        h, ys = x.new_zeros(len(x), WIDTH, 4), []
        for t in range(x.shape[1]):
            h = h @ Ab.T + x[:, t, :, None] * Bb
            ys.append(h @ m.C)
        return m.parts[0](torch.stack(ys, 1))

    return Mixer(forward, linear(WIDTH), A=torch.randn(4, 4) / 3 - torch.eye(4), B=torch.randn(4), C=torch.randn(4),
                 log_dt=torch.tensor(-1.0))  # fmt: skip


def lru() -> nn.Module:
    """Linear recurrent unit."""

    def forward(m: Any, x: Tensor) -> Tensor:
        lam = torch.exp(torch.complex(-torch.exp(m.nu_log), torch.exp(m.theta_log)))
        B = torch.view_as_complex(m.B) * torch.exp(m.gamma_log)[:, None]
        Bu = x.to(lam.dtype) @ B.T
        h, out = torch.zeros_like(Bu[:, 0]), []
        for t in range(x.shape[1]):
            h = lam * h + Bu[:, t]
            out.append(h)
        return (torch.stack(out, 1) @ torch.view_as_complex(m.C).T).real + m.D * x

    u = torch.rand(8)
    nu = torch.log(-0.5 * torch.log(u * (0.99**2 - 0.5**2) + 0.5**2))
    gamma = 0.5 * torch.log(1 - torch.exp(-2 * torch.exp(nu)))
    return Mixer(forward, nu_log=nu, theta_log=torch.log(0.3 * torch.rand(8)), gamma_log=gamma,
                 B=torch.randn(8, WIDTH, 2) / 4, C=torch.randn(WIDTH, 8, 2) / 4, D=torch.randn(WIDTH))  # fmt: skip


def _linoss(scheme: str) -> nn.Module:
    """Oscillatory state space: y'' = -A y + B u."""

    def forward(m: Any, x: Tensor) -> Tensor:
        A, dt = torch.relu(m.A), torch.sigmoid(m.dt)
        Bu = m.parts[0](x)
        z, y, ys = torch.zeros_like(Bu[:, 0]), torch.zeros_like(Bu[:, 0]), []
        for t in range(x.shape[1]):
            if scheme == "imex":
                z = z + dt * (-A * y + Bu[:, t])
                y = y + dt * z
            else:
                S = 1 / (1 + dt**2 * A)
                z, y = S * (z - dt * A * y + dt * Bu[:, t]), S * (dt * z + y + dt**2 * Bu[:, t])
            ys.append(y)
        return m.parts[1](torch.stack(ys, 1)) + m.D * x

    return Mixer(forward, linear(8), nn.Linear(8, WIDTH), A=torch.rand(8), dt=torch.randn(8), D=torch.randn(WIDTH))


def linoss_imex() -> nn.Module:
    return _linoss("imex")


def linoss_im() -> nn.Module:
    return _linoss("im")


def linoss_matrices() -> nn.Module:
    """LinOSS-IM with 2x2 matrices, as ports with a scan write it, run one after the other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        A, dt = torch.relu(m.A), torch.sigmoid(m.dt)
        schur = 1.0 / (1.0 + dt**2 * A)
        M = torch.stack([torch.stack([1.0 - dt**2 * A * schur, -dt * A * schur], -1),
                         torch.stack([dt * schur, schur], -1)], -2)  # fmt: skip
        Bu = m.parts[0](x)
        F = torch.stack([(1.0 - dt**2 * A * schur) * Bu * dt, dt**2 * schur * Bu], -1)
        s, out = x.new_zeros(len(x), 8, 2), []
        for t in range(x.shape[1]):
            s = torch.einsum("nij,bnj->bni", M, s) + F[:, t]
            out.append(s[..., 1])
        return m.parts[1](torch.stack(out, 1))

    return Mixer(forward, linear(8), nn.Linear(8, WIDTH), A=torch.rand(8), dt=torch.randn(8))
