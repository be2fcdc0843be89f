"""Recurrences over time inside one block, as their repositories write them: loops, parallel scans and convolutions."""

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


# ---------------------------------------------------------------- diagonal state spaces


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


# ---------------------------------------------------------------- oscillators


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


# ---------------------------------------------------------------- liquid cells, minimal gates


def ltc() -> nn.Module:
    """Liquid time constants: semi-implicit Euler."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            f = torch.sigmoid(x[:, t] @ m.W.T + h @ m.U.T + m.b)
            h = (h + 0.1 * f * m.A) / (1 + 0.1 * (1 / torch.exp(m.log_tau) + f))
            out.append(h)
        return m.parts[0](torch.stack(out, 1))

    return Mixer(forward, nn.Linear(8, WIDTH), W=torch.randn(8, WIDTH) / 2, U=torch.randn(8, 8) / 3,
                 b=torch.zeros(8), A=torch.randn(8), log_tau=torch.zeros(8))  # fmt: skip


def cfc() -> nn.Module:
    """Closed-form continuous time: two heads and a gate of time."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            z = torch.tanh(torch.cat([x[:, t], h], 1) @ m.B.T)
            a, b, c = z @ m.f.T, z @ m.g.T, z @ m.s.T
            t_gate = torch.sigmoid(-c)
            h = torch.tanh(a) * (1 - t_gate) + t_gate * torch.tanh(b)
            out.append(h)
        return m.parts[0](torch.stack(out, 1))

    return Mixer(forward, nn.Linear(8, WIDTH), B=torch.randn(16, WIDTH + 8) / 3, f=torch.randn(8, 16) / 4,
                 g=torch.randn(8, 16) / 4, s=torch.randn(8, 16) / 4)  # fmt: skip


def min_gru() -> nn.Module:
    """minGRU in its sequential form."""

    def forward(m: Any, x: Tensor) -> Tensor:
        z, new = torch.sigmoid(m.parts[0](x)), m.parts[1](x)
        h, out = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            h = (1 - z[:, t]) * h + z[:, t] * new[:, t]
            out.append(h)
        return m.parts[2](torch.stack(out, 1))

    return Mixer(forward, linear(8), linear(8), nn.Linear(8, WIDTH))


def min_gru_lerp() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        z, new = torch.sigmoid(m.parts[0](x)), m.parts[1](x)
        h, out = x.new_zeros(len(x), 8), []
        for zt, nt in zip(z.unbind(1), new.unbind(1), strict=True):
            h = torch.lerp(h, nt, zt)
            out.append(h)
        return m.parts[2](torch.stack(out, 1))

    return Mixer(forward, linear(8), linear(8), nn.Linear(8, WIDTH))


def min_lstm() -> nn.Module:
    """minLSTM with normalised gates."""

    def forward(m: Any, x: Tensor) -> Tensor:
        f, i = torch.sigmoid(m.parts[0](x)), torch.sigmoid(m.parts[1](x))
        f, i, new = f / (f + i), i / (f + i), m.parts[2](x)
        h, out = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            h = f[:, t] * h + i[:, t] * new[:, t]
            out.append(h)
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, linear(8), linear(8), linear(8), nn.Linear(8, WIDTH))


# ---------------------------------------------------------------- linear attention as a recurrence


def _projected(parts: int) -> list[nn.Module]:
    return [linear(4, bias=False) for _ in range(parts)]


def retnet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in m.parts[:3])
        S, out = x.new_zeros(len(x), 4, 4), []
        for n in range(x.shape[1]):
            S = 0.9 * S + k[:, n, :, None] * v[:, n, None, :]
            out.append((q[:, n, None] @ S)[:, 0])
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH))


def gla() -> nn.Module:
    """Gated linear attention: log gates, as the naive reference has it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in m.parts[:3])
        g = functional.logsigmoid(m.parts[3](x)) / 16
        S, out = x.new_zeros(len(x), 4, 4), torch.zeros_like(v)
        for i in range(x.shape[1]):
            S = S * g[:, i].exp().unsqueeze(-1) + k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
            out[:, i] = (q[:, i].unsqueeze(-1) * S).sum(-2)
        return m.parts[4](out)

    return Mixer(forward, *_projected(4), nn.Linear(4, WIDTH))


def delta_net() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.parts[0](x), functional.normalize(m.parts[1](x), dim=-1), m.parts[2](x)
        beta = torch.sigmoid(m.parts[4](x))
        S, out = x.new_zeros(len(x), 4, 4), []
        for n in range(x.shape[1]):
            old = (k[:, n, None] @ S)[:, 0]
            S = S + k[:, n, :, None] * (beta[:, n] * (v[:, n] - old))[:, None]
            out.append((q[:, n, None] @ S)[:, 0])
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH), linear(1))


def gated_delta() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.parts[0](x), functional.normalize(m.parts[1](x), dim=-1), m.parts[2](x)
        beta, decay = torch.sigmoid(m.parts[4](x)), -functional.softplus(m.parts[5](x))
        S, out = x.new_zeros(len(x), 4, 4), []
        for n in range(x.shape[1]):
            S = S * decay[:, n].exp()[..., None]
            old = (S * k[:, n, :, None]).sum(1)
            S = S + k[:, n, :, None] * ((v[:, n] - old) * beta[:, n])[:, None]
            out.append((S * q[:, n, :, None]).sum(1))
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH), linear(1), linear(1))


def gated_delta_by_products() -> nn.Module:
    """The same with matrix products, whose result might be taken for the value of a field."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.parts[0](x), functional.normalize(m.parts[1](x), dim=-1), m.parts[2](x)
        beta, decay = torch.sigmoid(m.parts[4](x)), -functional.softplus(m.parts[5](x))
        S, out = x.new_zeros(len(x), 4, 4), []
        for n in range(x.shape[1]):
            S = S * decay[:, n, :, None].exp()
            old = torch.einsum("bkv,bk->bv", S, k[:, n])
            S = S + torch.einsum("bk,bv->bkv", k[:, n], (v[:, n] - old) * beta[:, n])
            out.append(torch.einsum("bkv,bk->bv", S, q[:, n]))
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH), linear(1), linear(1))


def delta_product() -> nn.Module:
    """Two delta rules at every time."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, out = m.parts[0](x), []
        pairs = [(functional.normalize(m.parts[i](x), dim=-1), m.parts[i + 1](x)) for i in (1, 4)]
        beta, S = 2 * torch.sigmoid(m.parts[6](x)), x.new_zeros(len(x), 4, 4)
        for n in range(x.shape[1]):
            for k, v in pairs:
                old = torch.einsum("bkv,bk->bv", S, k[:, n])
                S = S + torch.einsum("bk,bv->bkv", k[:, n], (v[:, n] - old) * beta[:, n])
            out.append(torch.einsum("bkv,bk->bv", S, q[:, n]))
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH), linear(4), linear(4), linear(1))


def rwkv7() -> nn.Module:
    """A decay for every channel and a matrix of rank one, from the right."""

    def forward(m: Any, x: Tensor) -> Tensor:
        r, k, v = m.parts[0](x), m.parts[1](x), m.parts[2](x)
        w, a = torch.exp(-0.606531 * torch.sigmoid(m.parts[4](x))), torch.sigmoid(m.parts[5](x))
        kk = functional.normalize(k, dim=-1)
        S, out = x.new_zeros(len(x), 4, 4), []
        for n in range(x.shape[1]):
            removed = S @ -kk[:, n, :, None] @ (kk * a)[:, n, None, :]
            S = S * w[:, n, None, :] + removed + v[:, n, :, None] @ k[:, n, None, :]
            out.append((S @ r[:, n, :, None])[..., 0])
        return m.parts[3](torch.stack(out, 1))

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH), linear(4), linear(4))


# ---------------------------------------------------------------- cells written by hand


def elman() -> nn.Module:
    """No module is called in the loop."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ m.W.T + h @ m.U.T + m.b)
            out.append(h)
        return m.parts[0](torch.stack(out, 1))

    return Mixer(forward, nn.Linear(8, WIDTH), W=torch.randn(8, WIDTH) / 3, U=torch.randn(8, 8) / 3, b=torch.zeros(8))


def leaky() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            h = (1 - 0.2) * h + 0.2 * torch.tanh(functional.linear(h, m.U) + functional.linear(x[:, t], m.W, m.b))
            out.append(h)
        return m.parts[0](torch.stack(out, 1))

    return Mixer(forward, nn.Linear(8, WIDTH), W=torch.randn(8, WIDTH) / 3, U=torch.randn(8, 8) / 3, b=torch.zeros(8))


def lstm_by_hand() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, c, out = x.new_zeros(len(x), 8), x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            gates = functional.linear(x[:, t], m.W, m.b) + functional.linear(h, m.U)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return m.parts[0](torch.stack(out, 1))

    return Mixer(forward, nn.Linear(8, WIDTH), W=torch.randn(32, WIDTH) / 3, U=torch.randn(32, 8) / 3,
                 b=torch.zeros(32))  # fmt: skip


def cornn() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z, out = x.new_zeros(len(x), 8), x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            inner = torch.tanh(torch.cat([x[:, t], z, y], 1) @ m.W.T)
            z = z + 0.1 * (inner - 1.5 * y - 0.8 * z)
            y = y + 0.1 * z
            out.append(y)
        return m.parts[0](torch.stack(out, 1))

    return Mixer(forward, nn.Linear(8, WIDTH), W=torch.randn(8, WIDTH + 16) / 3)


def bidirectional() -> nn.Module:
    """Two scans of one layer, the second from the end."""

    def forward(m: Any, x: Tensor) -> Tensor:
        outs = []
        for u, a in ((x, m.a), (x.flip(1), m.c)):
            h, ys = x.new_zeros(len(x), WIDTH), []
            for t in range(x.shape[1]):
                h = torch.sigmoid(a) * h + u[:, t]
                ys.append(h)
            outs.append(torch.stack(ys, 1))
        return m.parts[0](outs[0] + outs[1].flip(1))

    return Mixer(forward, linear(WIDTH), a=torch.randn(WIDTH), c=torch.randn(WIDTH))


# ---------------------------------------------------------------- closed forms


def s4d_convolution() -> nn.Module:
    """S4D by its kernel, with the Fourier transform."""

    def forward(m: Any, x: Tensor) -> Tensor:
        length = x.shape[1]
        A, dt = -torch.exp(m.log_A), torch.exp(m.log_dt)[:, None]
        powers = torch.exp((dt * A)[..., None] * torch.arange(length))
        k = torch.einsum("hn,hn,hnl->hl", m.C, (torch.exp(dt * A) - 1) / A, powers)
        u = x.transpose(1, 2)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(k, n=2 * length), n=2 * length)
        return m.parts[0]((y[..., :length] + u * m.D[:, None]).transpose(1, 2))

    return Mixer(forward, linear(WIDTH), log_A=torch.zeros(WIDTH, 4), log_dt=torch.linspace(-4, -1, WIDTH),
                 C=torch.randn(WIDTH, 4), D=torch.ones(WIDTH))  # fmt: skip


def retnet_parallel() -> nn.Module:
    """RetNet by its masked product, all times at once."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in m.parts[:3])
        t = torch.arange(x.shape[1])
        decay = torch.where(t[:, None] >= t, 0.9 ** (t[:, None] - t).clamp(min=0).to(x.dtype), 0.0)
        return m.parts[3]((q @ k.transpose(1, 2) * decay) @ v)

    return Mixer(forward, *_projected(3), nn.Linear(4, WIDTH))


# ---------------------------------------------------------------- no recurrence


def each_alone() -> nn.Module:
    """A loop over times, each a slice of its own: nothing is carried from one to the next."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.parts[0](torch.stack([torch.tanh(x[:, t] * m.a) for t in range(x.shape[1])], 1))

    return Mixer(forward, linear(WIDTH), a=torch.randn(WIDTH))


def running_total() -> nn.Module:
    """A sum over all times in a loop: an integral, h' = u."""

    def forward(m: Any, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            total = total + m.a * x[:, t]
        return x * total.unsqueeze(1)

    return Mixer(forward, a=torch.randn(WIDTH) / 4)


#: layers with a loop over time: the name of its method, and how sure that is
SCANS: dict[Callable[[], nn.Module], tuple[str, str]] = {
    mamba: (r"exponential step \(exact in the state, mean \|a\| = ", "measured"),
    mamba2_recurrent: ("exponential step", "measured"),
    mamba3: (r"exponential trapezoid \(two-point input, mean \|a\| = ", "measured"),
    titans: (r"momentum \(beta = .* in the mean, the position kept with .* in the mean\)", "measured"),
    s4d_zoh: ("exponential step", "measured"),
    s4d_bilinear: (r"trapezoid \(bilinear", "measured"),
    s4d_backward: (r"backward Euler \(linear,", "measured"),
    s4d_forward: (r"linear recurrence \(mean \|a\| = ", "measured"),
    s4d_real: ("exponential step", "measured"),
    s4_dense_bilinear: (r"trapezoid \(bilinear", "measured"),
    lru: ("exponential step", "measured"),
    linoss_imex: (r"symplectic Euler \(linear oscillator\)", "measured"),
    linoss_im: (r"backward Euler \(linear oscillator\)", "measured"),
    linoss_matrices: (r"backward Euler \(linear oscillator\)", "measured"),
    ltc: (r"semi-implicit Euler \(mean a = ", "measured"),
    cfc: ("plain", "proven"),
    min_gru: (r"gated Euler \(mean a = ", "measured"),
    min_gru_lerp: (r"gated Euler \(mean a = ", "measured"),
    min_lstm: (r"gated Euler \(mean a = ", "measured"),
    retnet: (r"linear recurrence \(a = 0\.9\)", "proven"),
    gla: ("exponential step", "measured"),
    delta_net: (r"linear recurrence \(a matrix", "measured"),
    gated_delta: (r"linear recurrence \(a matrix", "measured"),
    gated_delta_by_products: (r"linear recurrence \(a matrix", "measured"),
    delta_product: (r"linear recurrence \(a matrix", "measured"),
    rwkv7: (r"linear recurrence \(a matrix", "measured"),
    elman: ("plain", "proven"),
    leaky: (r"damped Euler \(a = 0\.8\)", "proven"),
    lstm_by_hand: (r"gated memory cell \(LSTM\)", "measured"),
    cornn: (r"damped oscillator, symplectic Euler \(coRNN\)", "proven"),
    running_total: (r"sum over time \(a = 1\)", "proven"),
}
CLOSED = (s4d_convolution,)
