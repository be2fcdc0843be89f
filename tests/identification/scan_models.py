"""Recurrences over time inside one block, as their repositories write them: loops, parallel scans and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.identification.state_space_models import (
    WIDTH,
    Mixer,
    linear,
    linoss_im,
    linoss_imex,
    linoss_matrices,
    lru,
    mamba,
    mamba2_recurrent,
    s4_dense_bilinear,
    s4d_backward,
    s4d_bilinear,
    s4d_forward,
    s4d_real,
    s4d_zoh,
    titans,
)
from tests.identification.state_space_models import mamba3 as mamba3
from tests.identification.state_space_models import network as network

# ---------------------------------------------------------------- diagonal state spaces


# ---------------------------------------------------------------- oscillators


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
    mamba: (r"exponential step \(exact in the state, \|a\| ", "measured"),
    mamba2_recurrent: ("exponential step", "measured"),
    mamba3: (r"exponential trapezoid \(two-point input, \|a\| ", "measured"),
    titans: (r"momentum \(beta = .* by entry, the position kept with .* by entry\)", "measured"),
    s4d_zoh: ("exponential step", "proven"),
    s4d_bilinear: (r"trapezoid \(bilinear", "measured"),
    s4d_backward: (r"backward Euler \(linear,", "measured"),
    s4d_forward: (r"forward Euler \(linear, \|a\| ", "measured"),
    s4d_real: ("exponential step", "proven"),
    s4_dense_bilinear: (r"trapezoid \(bilinear", "measured"),
    lru: ("exponential step", "proven"),
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
    delta_net: (r"forward Euler \(linear, a matrix", "measured"),
    gated_delta: (r"decay and then forward Euler \(linear, a matrix", "measured"),
    gated_delta_by_products: (r"decay and then forward Euler \(linear, a matrix", "measured"),
    delta_product: (r"linear recurrence \(a matrix", "measured"),
    rwkv7: (r"linear recurrence \(a matrix", "measured"),
    elman: ("plain", "proven"),
    leaky: (r"damped Euler \(a = 0\.8\)", "proven"),
    lstm_by_hand: (r"gated memory cell \(LSTM\)", "measured"),
    cornn: (r"damped oscillator, symplectic Euler \(coRNN\)", "proven"),
    running_total: (r"sum over time \(a = 1\)", "proven"),
}
CLOSED = (s4d_convolution,)
