"""Networks of the further learners."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.diagnosis.learners import (
    Net,
    Pool,
    Position,
)


class Experts(nn.Module):
    """A mixture of experts behind a skip; each sample is sent to the best two, or to all."""

    def __init__(self, width: int, experts: int = 4, best: int | None = None) -> None:
        super().__init__()
        self.gate, self.best, self.norm = nn.Linear(width, experts), best, nn.LayerNorm(width)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        score = self.gate(h)
        if self.best:
            least = score.topk(self.best, dim=-1).values[..., -1:]
            score = score.masked_fill(score < least, -math.inf)
        weight = score.softmax(-1)
        return x + sum(weight[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts))


class GraphLayer(nn.Module):
    """A graph convolution on the grid of pixels, normalised by degree, or attention over neighbours."""

    def __init__(self, width: int, attention: bool = False) -> None:
        super().__init__()
        self.own, self.near, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.score = nn.Linear(2 * width, 1) if attention else None
        place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
        linked = torch.cdist(place, place) < 1.5
        self.register_buffer("linked", linked)
        self.register_buffer("mean", linked / linked.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        h, mean = self.norm(x), self.mean
        if self.score is not None:
            a, b = (h @ w for w in self.score.weight[0].chunk(2))
            score = functional.leaky_relu(a[:, :, None] + b[:, None] + self.score.bias)
            mean = score.masked_fill(~self.linked, -math.inf).softmax(-1)
        return x + torch.relu(self.own(h) + self.near(mean @ h))


def graph(attention: bool = False, depth: int = 4) -> nn.Module:
    stem = nn.Sequential(nn.Unflatten(1, (64, 1)), nn.Linear(1, 24), Position(64, 24))
    return Net(stem, [GraphLayer(24, attention) for _ in range(depth)], nn.Sequential(Pool(1), nn.Linear(24, 10)))


class Variational(nn.Module):
    """A variational autoencoder, whose code is drawn in training: image, mean and log variance in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_var / 2).exp() if self.training else mean
        return torch.cat([self.decoder(code), mean, log_var], dim=1)


def evidence_bound(out: Tensor, y: Tensor) -> Tensor:
    image, mean, log_var = out.split([64, 16, 16], dim=1)
    prior = (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
    return (image - y.flatten(1)).square().sum(1).mean() + 0.2 * prior


class Coupling(nn.Module):
    """An affine coupling: one half scales and shifts the other."""

    def __init__(self, width: int, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(width // 2, 32), nn.ReLU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)[:: -1 if self.flip else 1]
        log_scale, shift = self.net(a).chunk(2, dim=1)
        log_scale = log_scale.tanh()
        moved = b * log_scale.exp() + shift
        return torch.cat([moved, a] if self.flip else [a, moved], dim=1), log_scale.sum(1)


class NormalisingFlow(nn.Module):
    """Real NVP: the sample in its latent space, and log |det| in the last column."""

    def __init__(self, width: int = 2, depth: int = 6) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Coupling(width, bool(i % 2)) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return torch.cat([x, total[:, None]], dim=1)


def negative_log_likelihood(out: Tensor, _: Tensor) -> Tensor:
    z, log_det = out[:, :-1], out[:, -1]
    return (0.5 * z.square().sum(1) + 0.5 * math.log(2 * math.pi) * z.shape[1] - log_det).mean()


class FixedPoint(nn.Module):
    """A deep equilibrium model: z = tanh(W z + U x), iterated until it stands still."""

    def __init__(self, n_in: int, width: int, iterations: int = 20) -> None:
        super().__init__()
        self.W, self.U, self.iterations = nn.Linear(width, width, bias=False), nn.Linear(n_in, width), iterations
        nn.init.orthogonal_(self.W.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        given = self.U(x)
        z = torch.zeros_like(given)
        for _ in range(self.iterations):
            z = torch.tanh(self.W(z) + given)
        return z


class Causal(nn.Module):
    """A decoder of tokens whose head is the table of its embedding."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(12, width), Position(12, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.place(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.norm(x) @ self.embedding.weight.T


class ConvNext(nn.Module):
    """Depthwise convolution, layer norm, inverted bottleneck, LayerScale."""

    def __init__(self, width: int, scale: float = 1e-6) -> None:
        super().__init__()
        self.across = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.across(x).permute(0, 2, 3, 1))
        h = self.gamma * self.down(functional.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


class Siamese(nn.Module):
    """One encoder for both of a pair, and a head that sees how their codes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, pair: Tensor) -> Tensor:
        return self.head((self.encoder(pair[:, 0]) - self.encoder(pair[:, 1])).abs())


class FakeQuantised(nn.Linear):
    """A layer whose weights are rounded to so many bits, with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        unit = self.weight.abs().max().detach() / 7
        rounded = (self.weight / unit).round() * unit
        return functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class DropPath(nn.Module):
    """A residual block that is left out at random in training."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.f(x)
        keep = (torch.rand(len(x), 1) >= self.rate) / (1 - self.rate)
        return x + keep * self.f(x)


class Dense(nn.Module):
    """Appends what it makes of all before it."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, more, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.f(x)], dim=1)


class SqueezeExcite(nn.Module):
    """A convolution whose channels are weighed by what the whole image says, behind a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.weigh = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x + h * self.weigh(h.mean((2, 3)))[:, :, None, None]


class Inverted(nn.Module):
    """MobileNet's block: widen, depthwise, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 3 * width
        parts = [nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()]
        parts += [nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()]
        self.f = nn.Sequential(*parts, nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Reversible(nn.Module):
    """Two streams that update each other in turn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in "fg")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], dim=1)


class RungeKutta(nn.Module):
    """One field of state and time, integrated by rk4."""

    def __init__(self, width: int, steps: int = 4) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width + 1, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
        self.steps = steps

    def field(self, t: float, x: Tensor) -> Tensor:
        return self.f(torch.cat([x, torch.full_like(x[:, :1], t)], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        h = 1.0 / self.steps
        for i in range(self.steps):
            t = i * h
            a = self.field(t, x)
            b = self.field(t + h / 2, x + h / 2 * a)
            c = self.field(t + h / 2, x + h / 2 * b)
            d = self.field(t + h, x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x


class Antisymmetric(nn.Module):
    """A step of x' = tanh((W - W^T - 0.1) x + b), which neither grows nor decays."""

    def __init__(self, width: int, h: float = 0.2) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.b, self.h = nn.Parameter(torch.zeros(width)), h

    def forward(self, x: Tensor) -> Tensor:
        A = self.W - self.W.T - 0.1 * torch.eye(len(self.W))
        return x + self.h * torch.tanh(x @ A.T + self.b)


class ReZero(nn.Module):
    """x + alpha f(x), with alpha zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.f(x)


class Maxout(nn.Module):
    """The larger of two linear maps."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.f = nn.Linear(n_in, 2 * n_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(*self.f(x).chunk(2, dim=-1))


class Gated(nn.Module):
    """Attention and a gated layer as in Llama: RMS norms, SwiGLU, no biases."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.RMSNorm(width), nn.RMSNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.gate = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))
