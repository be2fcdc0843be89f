"""Transformers and other token mixers as their papers' repositories write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .paper import Paper, Repeated, block

D, T = 8, 5


def tokens() -> Tensor:
    return torch.randn(2, T, D)


class Attention(nn.Module):
    def __init__(self, _width: int = D, *, linear: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.linear = nn.Linear(D, 3 * D), nn.Linear(D, D), linear

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.linear:
            q, k = functional.elu(q) + 1, functional.elu(k) + 1
            kv = k.transpose(1, 2) @ v
            return self.out((q @ kv) / (q @ k.sum(1)[..., None]))
        return self.out(torch.softmax(q @ k.transpose(-1, -2) / D**0.5, -1) @ v)


def ffn(d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


def norm(d: int) -> nn.Module:
    return nn.LayerNorm(d)


class Layer(nn.Module):
    """A whole pre-norm layer as a field: what a layer adds to its input."""

    def __init__(self, _width: int = D) -> None:
        super().__init__()
        self.n1, self.n2, self.att, self.ffn = norm(D), norm(D), Attention(), ffn(D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.att(self.n1(x))
        return y + self.ffn(self.n2(x + y))


def macaron(m: Any, x: Tensor) -> Tensor:
    x = x + 0.5 * m.parts[0](m.parts[3](x))
    x = x + m.parts[1](m.parts[4](x))
    return x + 0.5 * m.parts[2](m.parts[5](x))


class ConvModule(nn.Module):
    def __init__(self, _width: int = D) -> None:
        super().__init__()
        self.n, self.p1, self.d, self.p2 = (
            norm(D),
            nn.Conv1d(D, 2 * D, 1),
            nn.Conv1d(D, D, 3, padding=1, groups=D),
            nn.Conv1d(D, D, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.glu(self.p1(self.n(x).transpose(1, 2)), 1)
        return self.p2(functional.silu(self.d(y))).transpose(1, 2)


def conformer(m: Any, x: Tensor) -> Tensor:
    x = x + 0.5 * m.parts[0](x)
    x = x + m.parts[1](x)
    x = x + m.parts[2](x)
    return m.parts[4](x + 0.5 * m.parts[3](x))


def pre_norm(m: Any, x: Tensor) -> Tensor:
    x = x + m.parts[0](m.parts[2](x))
    return x + m.parts[1](m.parts[3](x))


def neox(m: Any, x: Tensor) -> Tensor:
    return x + m.parts[0](m.parts[2](x)) + m.parts[1](m.parts[3](x))


def gemma2(m: Any, x: Tensor) -> Tensor:
    x = x + m.parts[4](m.parts[0](m.parts[2](x)))
    return x + m.parts[5](m.parts[1](m.parts[3](x)))


def laurel(m: Any, x: Tensor) -> Tensor:
    a = torch.softmax(m.g, 0)
    return a[0] * m.parts[0](m.parts[1](x)) + a[1] * x


def deepnorm(m: Any, x: Tensor) -> Tensor:
    x = m.parts[2](x * 1.565 + m.parts[0](x))
    return m.parts[3](x * 1.565 + m.parts[1](x))


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = (nn.LayerNorm(D, elementwise_affine=False) for _ in range(2))
        self.att, self.ffn, self.ada = Attention(), ffn(D), nn.Linear(D, 6 * D)
        self.register_buffer("c", torch.randn(2, D))

    def forward(self, x: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.ada(functional.silu(self.c)).unsqueeze(1).chunk(6, -1)
        x = x + g1 * self.att(self.n1(x) * (1 + s1) + b1)
        return x + g2 * self.ffn(self.n2(x) * (1 + s2) + b2)


class MoE(nn.Module):
    def __init__(self, _width: int = D) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList(ffn(D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = torch.topk(torch.softmax(self.gate(flat), -1), 2)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, k = torch.where(chosen == e)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, k, None])
        return out.view_as(x)


def moe(m: Any, x: Tensor) -> Tensor:
    x = x + m.parts[0](m.parts[2](x))
    return x + m.parts[1](m.parts[3](x))


class MoD(nn.Module):
    """Mixture of depths: half of the tokens take the block."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.f = nn.Linear(D, 1), ffn(D)

    def forward(self, x: Tensor) -> Tensor:
        w, chosen = torch.topk(self.router(x)[..., 0], 2, dim=1)
        index = chosen[..., None].expand(-1, -1, D)
        return x.scatter_add(1, index, self.f(x.gather(1, index)) * torch.sigmoid(w)[..., None])


class ResFormer(nn.Module):
    """Value residual: every layer's values are mixed with the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qk": nn.Linear(D, 2 * D), "v": nn.Linear(D, D), "f": ffn(D), "n": norm(D)})
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        v1 = None
        for m in self.layers:
            y = m["n"](x)
            q, k = m["qk"](y).chunk(2, -1)
            v = m["v"](y)
            v1 = v if v1 is None else v1
            x = x + torch.softmax(q @ k.transpose(1, 2), -1) @ (0.5 * v + 0.5 * v1)
            x = x + m["f"](x)
        return x


class ODETransformer(nn.Module):
    def __init__(self, order: int, *, learned: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.f, self.order, self.learned = Layer(), order, learned
        self.gate = nn.Linear(2 * D, D) if gated else None
        self.w = nn.Parameter(torch.tensor([0.4, 0.6]))

    def forward(self, x: Tensor) -> Tensor:
        f = self.f
        k1 = f(x)
        if self.order == 4:
            k2 = f(x + 0.5 * k1)
            k3 = f(x + 0.5 * k2)
            k4 = f(x + k3)
            return x + 1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        k2 = f(x + k1)
        if self.gate is not None:
            g = torch.sigmoid(self.gate(torch.cat([k1, k2], -1)))
            return x + g * k1 + (1 - g) * k2
        return x + (self.w[0] * k1 + self.w[1] * k2 if self.learned else 0.5 * (k1 + k2))


class DenseFormer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(pre_norm, Attention, ffn, norm, norm)() for _ in range(4))
        self.alphas = nn.ParameterList(
            nn.Parameter(torch.cat([0.1 * torch.rand(i + 1), torch.ones(1)])) for i in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer, a in zip(self.layers, self.alphas, strict=True):
            seen_now = [*seen, layer(x)]
            x = torch.tensordot(a, torch.stack(seen_now), dims=1)
            seen.append(x)
        return x


class HyperConnections(nn.Module):
    """n residual streams: static alpha and beta of Zhu et al. 2024."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.n, self.fs = n, nn.ModuleList(nn.Sequential(norm(D), ffn(D)) for _ in range(4))
        self.read = nn.ParameterList(nn.Parameter(torch.rand(n)) for _ in range(4))
        self.mix = nn.ParameterList(nn.Parameter(torch.eye(n) + 0.1 * torch.randn(n, n)) for _ in range(4))
        self.write = nn.ParameterList(nn.Parameter(torch.rand(n)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(2).expand(-1, -1, self.n, -1)
        for f, a, m, b in zip(self.fs, self.read, self.mix, self.write, strict=True):
            y = f(torch.einsum("n,btnd->btd", a, h))
            h = torch.einsum("mn,btnd->btmd", m, h) + b[:, None] * y[:, :, None]
        return h.sum(2)


class ModdedNanoGPT(nn.Module):
    """x <- lambda0 x + lambda1 x0, then a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(norm(D), ffn(D)) for _ in range(4))
        self.lambdas = nn.ParameterList(nn.Parameter(torch.tensor([0.9, 0.1])) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x0 = x
        for f, w in zip(self.blocks, self.lambdas, strict=True):
            x = w[0] * x + w[1] * x0
            x = x + f(x)
        return x


class NGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.alpha = ffn(D), nn.Parameter(torch.full((D,), 0.1))

    def forward(self, h: Tensor) -> Tensor:
        y = functional.normalize(self.f(h), dim=-1)
        return functional.normalize(h + self.alpha * (y - h), dim=-1)


class Looped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.b = nn.Sequential(nn.Linear(2 * D if kind == "concatenated" else D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, e: Tensor) -> Tensor:
        h = torch.zeros_like(e) if self.kind != "plain" else e
        for _ in range(5):
            if self.kind == "added":
                h = self.b(h + e)
            elif self.kind == "concatenated":
                h = self.b(torch.cat([h, e], -1))
            else:
                h = h + self.b(h)
        return h


class Monarch(nn.Module):
    """Monarch mixer: sequence mixing with gates, then channel mixing, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.m1, self.m2 = nn.Parameter(torch.randn(T, T) / 2), nn.Parameter(torch.randn(T, T) / 2)
        self.k, self.ffn, self.n1, self.n2 = nn.Parameter(torch.randn(T, D)), ffn(D), norm(D), norm(D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        x = x + torch.einsum("st,btd->bsd", self.m2, self.k * torch.einsum("st,btd->bsd", self.m1, y))
        return x + self.ffn(self.n2(x))


ROWS = (
    Paper("Macaron", Repeated(block(macaron, ffn, Attention, ffn, norm, norm, norm), tokens), r"Strang|Macaron"),
    Paper("Conformer", Repeated(block(conformer, ffn, Attention, ConvModule, ffn, norm), tokens), r"post-norm"),
    Paper("pre-norm", Repeated(block(pre_norm, Attention, ffn, norm, norm), tokens), r"Lie|forward Euler$"),
    Paper("NeoX parallel", Repeated(block(neox, Attention, ffn, norm, norm), tokens), r"parallel branches"),
    Paper("Gemma2", Repeated(block(gemma2, Attention, ffn, *(norm,) * 4), tokens), r"Lie|forward Euler$"),
    Paper("LAuReL", Repeated(block(laurel, ffn, norm, g=(2,)), tokens), r"damped Euler"),
    Paper("DeepNorm", Repeated(block(deepnorm, Attention, ffn, norm, norm), tokens), r"post-norm", h=1.0),
    Paper("DiT", Repeated(DiT, tokens), r"Lie|forward Euler$|splitting"),
    Paper("MoE", Repeated(block(moe, Attention, MoE, norm, norm), tokens, batch_dim=None), r"Lie|forward Euler$"),
    Paper("MoD", Repeated(MoD, tokens), r"forward Euler"),
    Paper(
        "linear attention",
        Repeated(block(pre_norm, lambda d: Attention(linear=True), ffn, norm, norm), tokens),
        r"Lie|forward Euler$",
    ),
    Paper("ResFormer", Repeated(ResFormer, tokens, 1), r"Lie|forward Euler"),
    Paper("ODE-Transformer RK2", Repeated(lambda: ODETransformer(2), tokens), r"heun2"),
    Paper("ODE-Transformer RK4", Repeated(lambda: ODETransformer(4), tokens), r"rk4"),
    Paper("ODE-Transformer, learned", Repeated(lambda: ODETransformer(2, learned=True), tokens), r"Runge-Kutta|heun"),
    Paper("ODE-Transformer, gated", Repeated(lambda: ODETransformer(2, gated=True), tokens), r"gated"),
    Paper("DenseFormer", Repeated(DenseFormer, tokens, 1), r"history|general linear|depth-weighted"),
    Paper("hyper-connections", Repeated(HyperConnections, tokens, 1), r"general linear method of 2 streams"),
    Paper("modded-nanogpt x0", Repeated(ModdedNanoGPT, tokens, 1), r"damped", r"forward Euler|Euler steps"),
    Paper("nGPT", Repeated(NGPT, tokens), r"projected|retract|post-norm"),
    Paper("looped, plain", Repeated(lambda: Looped("plain"), tokens, 1), r"forward Euler"),
    Paper("looped, added", Repeated(lambda: Looped("added"), tokens, 1), r"plain"),
    Paper("looped, concatenated", Repeated(lambda: Looped("concatenated"), tokens, 1), r"plain"),
    Paper("Monarch Mixer", Repeated(Monarch, tokens), r"Lie|forward Euler$"),
)
