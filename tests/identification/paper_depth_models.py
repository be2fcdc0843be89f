"""Residual networks over depth as their papers' repositories write them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.identification.paper_solver_models import AB2, BDF2, C, D, MonDEQ, deq, etd1

from .paper import Paper, Repeated, block, conv_branch, mlp


def images() -> Tensor:
    return torch.randn(2, C, 6, 6)


def vectors() -> Tensor:
    return torch.randn(2, D)


class InResNet(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.branch, self.k, self.scaled = conv_branch(C), nn.Parameter(torch.tensor(0.22)), scaled

    def forward(self, x: Tensor) -> Tensor:
        lam = functional.relu(self.k)
        out = self.branch(x)
        return (1 + lam) * out + (1 - lam) * x if self.scaled else out + (1 - lam) * x


class LMResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(conv_branch(C) for _ in range(5))
        self.ks = nn.ParameterList(nn.Parameter(torch.tensor(1.0 + 0.02 * (i + 1))) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        last = x
        for k, f in zip(self.ks, self.blocks, strict=True):
            x, last = k * x + (1 - k) * last + f(x), x
        return x


def poly2(m: Any, x: Tensor) -> Tensor:
    y = m.parts[0](x)
    return x + y + m.parts[0](y)


def poly3(m: Any, x: Tensor) -> Tensor:
    y = m.parts[0](x)
    z = m.parts[0](y)
    return x + y + z + m.parts[0](z)


def mpoly2(m: Any, x: Tensor) -> Tensor:
    y = m.parts[0](x)
    return functional.relu(x + y + m.parts[1](y))


def way2(m: Any, x: Tensor) -> Tensor:
    return x + m.parts[0](x) + m.parts[1](x)


def fractal(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.parts[0](x), m.parts[2](m.parts[1](x))]).mean(0)


class Momentum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.functions, self.gamma = nn.ModuleList(mlp(D) for _ in range(5)), 0.9

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in self.functions:
            v = v * self.gamma + f(x) * (1 - self.gamma)
            x = x + v
        return x


class RevNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(D // 2), mlp(D // 2)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.chunk(x, 2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=1)


class IRevNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp(D // 2)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x[1], self.f(x[1]) + x[0]


class IRevStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(IRevNet() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        pair = (x[:, : D // 2], x[:, D // 2 :])
        for b in self.blocks:
            pair = b(pair)
        return torch.cat(pair, dim=1)


def h1_dnn(m: Any, x: Tensor) -> Tensor:
    y, z = x.chunk(2, dim=1)
    z = z - m.h * torch.tanh(functional.linear(y, m.K, m.b)) @ m.K
    y = y + m.h * torch.tanh(functional.linear(z, m.K, m.c)) @ m.K
    return torch.cat([y, z], dim=1)


class H2DNN(nn.Module):
    """Verlet: x'' = -K^T tanh(K x), written with h before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.Ks = nn.ParameterList(nn.Parameter(torch.randn(D, D) / 3) for _ in range(5))
        self.h = 0.2

    def forward(self, y: Tensor) -> Tensor:
        z = torch.zeros_like(y)
        for K in self.Ks:
            z = z - self.h * torch.tanh(y @ K) @ K.t()
            y = y + self.h * z
        return y


class Leapfrog(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(5))
        self.h = 0.3

    def forward(self, y: Tensor) -> Tensor:
        old = y
        for conv in self.convs:
            back = functional.conv_transpose2d(torch.tanh(conv(y)), conv.weight, padding=1)
            y, old = 2 * y - old - self.h**2 * back, y
        return y


def parabolic(m: Any, y: Tensor) -> Tensor:
    return y - 0.1 * functional.conv_transpose2d(
        functional.relu(m.parts[1](m.parts[0](y))), m.parts[0].weight, padding=1
    )


def skew_conv(m: Any, x: Tensor) -> Tensor:
    w = m.parts[0].weight
    skew = w - torch.flip(w.transpose(0, 1), dims=[2, 3])
    return x + 0.1 * torch.tanh(functional.conv2d(x, skew, m.parts[0].bias, padding=1) - 0.05 * x)


def cayley(m: Any, x: Tensor) -> Tensor:
    A = m.W - m.W.T
    eye = torch.eye(D, dtype=x.dtype)
    return x @ torch.linalg.solve(eye + A, eye - A).T


def highway(m: Any, x: Tensor) -> Tensor:
    t = torch.sigmoid(m.parts[1](x))
    return t * functional.relu(m.parts[0](x)) + (1 - t) * x


class RealNVP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0.0] * (D // 2)))
        self.s, self.t = mlp(D), mlp(D)

    def forward(self, x: Tensor) -> Tensor:
        kept = x * self.mask
        s, t = torch.tanh(self.s(kept)) * (1 - self.mask), self.t(kept) * (1 - self.mask)
        return x * torch.exp(s) + t


class NICE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(mlp(D // 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        on, off = x[:, ::2], x[:, 1::2]
        for index, m in enumerate(self.couplings):
            if index % 2:
                off = off + m(on)
            else:
                on = on + m(off)
        return torch.stack([on, off], dim=2).reshape(x.shape)


class Glow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.randn(1, C, 1, 1)), nn.Parameter(torch.rand(1, C, 1, 1) + 0.5)
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(C, C))[0].unsqueeze(2).unsqueeze(3))
        self.net = nn.Sequential(nn.Conv2d(C // 2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, C, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.scale * (x + self.loc), self.weight)
        a, b = x.chunk(2, 1)
        log_s, t = self.net(a).chunk(2, 1)
        return torch.cat([a, (b + t) * torch.sigmoid(log_s + 2)], 1)


class IResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(*(nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f[1](functional.elu(self.f[0](functional.elu(x))))


class SDENet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drift, self.diffusion, self.steps = mlp(D), nn.Linear(D, 1), 6

    def forward(self, x: Tensor) -> Tensor:
        dt = 1.0 / self.steps
        g = 0.5 * torch.sigmoid(self.diffusion(x))
        for _ in range(self.steps):
            x = x + self.drift(x) * dt + g * math.sqrt(dt) * torch.randn_like(x)
        return x


class ImplicitEuler(nn.Module):
    """Backward Euler by a fixed number of fixed-point iterations, unrolled."""

    def __init__(self, theta: float = 1.0) -> None:
        super().__init__()
        self.f, self.h, self.theta = nn.Sequential(nn.Linear(D, D), nn.Tanh()), 0.3, theta

    def forward(self, x: Tensor) -> Tensor:
        z, fx = x, self.f(x)
        for _ in range(12):
            z = x + self.h * ((1 - self.theta) * fx + self.theta * self.f(z))
        return z


class KANLayer(nn.Module):
    """efficient-kan: silu base weight and B-splines on a grid."""

    def __init__(self) -> None:
        super().__init__()
        grid = torch.arange(-3, 9) * 0.4 - 1
        self.register_buffer("grid", grid.expand(D, -1).contiguous())
        self.base, self.spline = nn.Parameter(torch.randn(D, D) / 3), nn.Parameter(torch.randn(D, D, 8) / 5)

    def forward(self, x: Tensor) -> Tensor:
        base, v = functional.linear(functional.silu(x), self.base), x.unsqueeze(-1)
        g = self.grid
        b = ((v >= g[:, :-1]) & (v < g[:, 1:])).to(v.dtype)
        for k in range(1, 4):
            left = (v - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)])
            right = (g[:, k + 1 :] - v) / (g[:, k + 1 :] - g[:, 1:(-k)])
            b = left * b[..., :-1] + right * b[..., 1:]
        return base + functional.linear(b.view(len(x), -1), self.spline.view(D, -1))


class DCNv2(nn.Module):
    """Deep and cross network: x <- x0 * (W x + b) + x."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        return x


def adjacency(n: int = 6) -> Tensor:
    a = (torch.rand(n, n, generator=torch.Generator().manual_seed(3)) < 0.4).float()
    a = ((a + a.T) > 0).float()
    a.fill_diagonal_(1)
    d = a.sum(1).rsqrt()
    return d[:, None] * a * d[None]


class PDEGCN(nn.Module):
    """Diffusion on a graph: x - h G^T K^T relu(K G x)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("G", torch.randn(9, 6) / 2)
        self.K = nn.ParameterList(nn.Parameter(torch.randn(D, D) / 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for K in self.K:
            x = x - 0.1 * self.G.T @ (functional.relu(self.G @ x @ K) @ K.T)
        return x


class GRAND(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            a = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) / D**0.5, dim=-1)
            x = x + 0.5 * (a @ x - x)
        return x


class GraphCON(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.register_buffer("A", adjacency())
        self.dt, self.alpha, self.gamma = 0.5, 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = y + self.dt * (functional.relu(self.A @ conv(x)) - self.alpha * y - self.gamma * x)
            x = x + self.dt * y
        return x


class APPNP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.register_buffer("A", adjacency())

    def forward(self, x: Tensor) -> Tensor:
        h = x = self.lin(x)
        for _ in range(4):
            x = (1 - 0.1) * (self.A @ x) + 0.1 * h
        return x


class IMEXNet(nn.Module):
    """Haber 2019: (I + h L)^-1 (x + h f(x)), L a depthwise kernel, solved with FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.L, self.h = conv_branch(C), nn.Parameter(torch.rand(C, 3, 3)), 0.1

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.zeros_like(x[0])
        kernel[:, :3, :3] = self.L
        symbol = torch.fft.rfft2(torch.roll(kernel, (-1, -1), (1, 2)))
        rhs = x + self.h * (self.f(x) + torch.fft.irfft2(torch.fft.rfft2(x) * symbol.abs().square(), s=(6, 6)))
        return torch.fft.irfft2(torch.fft.rfft2(rhs) / (1 + self.h * symbol.abs().square()), s=(6, 6))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.up = nn.Conv2d(C, C, 3, 2, 1), conv_branch(C), nn.ConvTranspose2d(C, C, 2, 2)
        self.blocks, self.out = nn.ModuleList(conv_branch(C) for _ in range(2)), nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        y = self.down(x)
        y = self.up(y + self.mid(y))
        y = self.out(torch.cat([x, y], 1))
        return y + self.blocks[1](y)


ROWS = (
    Paper("In-ResNet", Repeated(lambda: InResNet(False), images), r"damped Euler \(a = 0\.78"),
    Paper("lambda-In-ResNet", Repeated(lambda: InResNet(True), images), r"damped Euler \(a = 0\.78"),
    Paper("LM-ResNet", Repeated(LMResNet, images, 1), r"two-step \(LM-ResNet"),
    Paper("PolyNet 2-way", Repeated(block(way2, conv_branch, conv_branch, width=C), images), r"parallel branches"),
    Paper("PolyNet poly-2", Repeated(block(poly2, conv_branch, width=C), images), r"poly-2"),
    Paper("PolyNet poly-3", Repeated(block(poly3, conv_branch, width=C), images), r"poly-3"),
    Paper("PolyNet mpoly-2", Repeated(block(mpoly2, conv_branch, conv_branch, width=C), images), r"mpoly-2"),
    Paper("FractalNet", Repeated(block(fractal, conv_branch, conv_branch, conv_branch, width=C), images), r"plain"),
    Paper("Momentum ResNet", Repeated(Momentum, vectors, 1), r"momentum \(gamma = 0\.9"),
    Paper("RevNet", Repeated(RevNet, vectors), r"reversible"),
    Paper("i-RevNet", Repeated(IRevStack, vectors, 1), r"leapfrog|two-step|reversible"),
    Paper(
        "H1-DNN",
        Repeated(block(h1_dnn, K=(D // 2, D // 2), b=(D // 2,), c=(D // 2,), h=0.2), vectors),
        r"symplectic Euler \(Hamiltonian|reversible",
        h=0.2,
    ),
    Paper("H2-DNN (Verlet)", Repeated(H2DNN, vectors, 1), r"symplectic Euler|verlet|leapfrog", h=0.2),
    Paper("leapfrog conv", Repeated(Leapfrog, images, 1), r"second_order_leapfrog", h=0.3),
    Paper(
        "parabolic CNN",
        Repeated(
            block(
                parabolic, lambda c: nn.Conv2d(c, c, 3, padding=1, bias=False), lambda c: nn.InstanceNorm2d(c), width=C
            ),
            images,
        ),
        r"forward Euler$",
        h=0.1,
    ),
    Paper(
        "skew conv",
        Repeated(block(skew_conv, lambda c: nn.Conv2d(c, c, 3, padding=1), width=C), images),
        r"forward Euler$",
        h=0.1,
    ),
    Paper("Cayley", Repeated(block(cayley, W=(D, D)), vectors), r"plain"),
    Paper(
        "highway",
        Repeated(block(highway, lambda d: nn.Linear(d, d), lambda d: nn.Linear(d, d)), vectors),
        r"gated Euler",
    ),
    Paper("RealNVP", Repeated(RealNVP, vectors), r"affine coupling"),
    Paper("NICE", Repeated(NICE, vectors, 1), r"reversible|additive coupling"),
    Paper("Glow", Repeated(Glow, images), r"affine coupling|plain"),
    Paper("i-ResNet", Repeated(IResNet, vectors), r"forward Euler$"),
    Paper("SDE-Net", Repeated(SDENet, vectors, 1), r"Euler-Maruyama", r"forward Euler"),
    Paper("implicit Euler, unrolled", Repeated(ImplicitEuler, vectors), r"backward Euler|backward_euler|fixed point"),
    Paper("Crank-Nicolson, unrolled", Repeated(lambda: ImplicitEuler(0.5), vectors), r"trapezoid|Crank|fixed point"),
    Paper("KAN", Repeated(KANLayer, vectors), r"plain"),
    Paper("DCN-v2", Repeated(DCNv2, vectors, 1), r"forward Euler"),
    Paper("PDE-GCN", Repeated(PDEGCN, lambda: torch.randn(6, D), 1, batch_dim=None), r"forward Euler$", h=0.1),
    Paper("GRAND", Repeated(GRAND, lambda: torch.randn(2, 6, D), 1), r"damped Euler \(a = 0\.5", h=0.5),
    Paper("GraphCON", Repeated(GraphCON, lambda: torch.randn(6, D), 1, batch_dim=None), r"oscillator"),
    Paper(
        "APPNP",
        Repeated(APPNP, lambda: torch.randn(6, D), 1, batch_dim=None),
        r"damped|restart|plain|linear skip",
        which=-1,
    ),
    Paper("IMEXnet", Repeated(IMEXNet, images), r"semi-implicit|IMEX"),
    Paper("U-Net", Repeated(UNet, images, 1), r"forward Euler$", which=0),
    Paper("DEQ Anderson", Repeated(deq, vectors, 1), r"implicit"),
    Paper("monDEQ, unrolled", Repeated(MonDEQ, vectors, 1), r"damped Euler \(a = 0\.7|projected"),
    Paper("BDF2 by solves", Repeated(BDF2, vectors, 1), r"bdf2", r"semi-implicit|steps of"),
    Paper("AB2", Repeated(AB2, vectors, 1), r"ab2"),
    Paper("ETD1", Repeated(block(etd1, mlp), vectors), r"damped Euler \(a = 0\.819"),
)
