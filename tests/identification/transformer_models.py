"""Transformers and state-space models along depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Step, constant, stack

TOKENS = (2, 5, 8)


class Attention(nn.Module):
    """Two heads, written out."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (part.reshape(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))


class RMSNorm(nn.Module):
    """Written out, as many models have it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Norm(nn.Module):
    """Layer norm, written out."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5)


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.silu(self.a(x)) * self.b(x))


def feed_forward(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))


def pre_norm(norm: Any = lambda: nn.LayerNorm(8), mlp: Any = feed_forward) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + m.parts[0](m.parts[2](x))
        return x + m.parts[1](m.parts[3](x))

    return Step(forward, Attention(), mlp(), norm(), norm())


def post_norm(norm: Any = lambda: nn.LayerNorm(8)) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.parts[2](x + m.parts[0](x))
        return m.parts[3](x + m.parts[1](x))

    return Step(forward, Attention(), feed_forward(), norm(), norm())


def parallel() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.parts[2](x)
        return x + m.parts[0](y) + m.parts[1](y)

    return Step(forward, Attention(), feed_forward(), nn.LayerNorm(8))


def macaron() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + 0.5 * m.parts[1](m.parts[3](x))
        x = x + m.parts[0](m.parts[4](x))
        return x + 0.5 * m.parts[2](m.parts[5](x))

    return Step(forward, Attention(), feed_forward(), feed_forward(), *(nn.LayerNorm(8) for _ in range(3)))


class Mamba(nn.Module):
    """A selective state-space layer by a loop over time; along depth it is the branch of a residual."""

    def __init__(self, width: int = 8, size: int = 3) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.delta, self.B, self.C = nn.Linear(width, width), nn.Linear(width, size), nn.Linear(width, size)
        self.log_A = nn.Parameter(torch.zeros(width, size))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inner(x).chunk(2, dim=-1)
        u = nn.functional.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        delta, B, C = nn.functional.softplus(self.delta(u)), self.B(u), self.C(u)
        h = torch.zeros(*u.shape[::2], B.shape[-1], dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            decay = torch.exp(-delta[:, t, :, None] * self.log_A.exp())
            h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
            outputs.append((h * C[:, t, None, :]).sum(-1))
        return self.out(torch.stack(outputs, dim=1) * nn.functional.silu(gate))


class StateSpace(nn.Module):
    """An S4D-like layer: a long convolution with the kernel of a diagonal system, by FFT."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.decay, self.mix = nn.Parameter(torch.linspace(0.1, 1.0, width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        kernel = torch.exp(-self.decay[:, None] * torch.arange(length, dtype=x.dtype))
        spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
        return self.mix(nn.functional.gelu(y))


def residual(branch: Any, norm: Any = lambda: nn.LayerNorm(8)) -> nn.Module:
    return Step(lambda m, x: x + m.parts[0](m.parts[1](x)), branch(), norm())


def lie(f: complex, g: complex) -> complex:
    return (1 + f) * (1 + g)


LIE = "Lie splitting (2 Euler steps)"
PROJECTED = "projected Euler (post-norm)"
FAMILIES = (
    Family("pre-LN transformer", LIE, stack(pre_norm, TOKENS), constant(lie)),
    Family("pre-RMSNorm, SwiGLU", LIE, stack(lambda: pre_norm(RMSNorm, Gated), TOKENS), constant(lie)),
    Family("pre-norm written out", LIE, stack(lambda: pre_norm(Norm), TOKENS), constant(lie)),
    Family("post-LN transformer", PROJECTED, stack(post_norm, TOKENS), constant(lie)),
    Family("post-RMSNorm written out", PROJECTED, stack(lambda: post_norm(RMSNorm), TOKENS), constant(lie)),
    Family("post-norm written out", PROJECTED, stack(lambda: post_norm(Norm), TOKENS), constant(lie)),
    Family("parallel (GPT-J)", "forward Euler, parallel branches", stack(parallel, TOKENS),
           constant(lambda f, g: 1 + f + g)),
    Family("Macaron", "Strang-ordered splitting (Macaron)", stack(macaron, TOKENS),
           constant(lambda f, g, e: (1 + f / 2) * (1 + g) * (1 + e / 2))),
    Family("Mamba, along depth", "forward Euler", stack(lambda: residual(Mamba, RMSNorm), TOKENS),
           constant(lambda z: 1 + z)),
    Family("S4-like, along depth", "forward Euler", stack(lambda: residual(StateSpace), TOKENS),
           constant(lambda z: 1 + z)),
)  # fmt: skip
