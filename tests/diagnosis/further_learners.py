"""Further kinds of networks that learn: experts, graphs, flows, fixed points, gates, norms, and what people train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.diagnosis.further_models import (
    Antisymmetric,
    Causal,
    ConvNext,
    Dense,
    DropPath,
    Experts,
    FakeQuantised,
    FixedPoint,
    Gated,
    Inverted,
    Maxout,
    NormalisingFlow,
    Reversible,
    ReZero,
    RungeKutta,
    Siamese,
    SqueezeExcite,
    Variational,
    evidence_bound,
    graph,
    negative_log_likelihood,
)
from tests.diagnosis.learners import (
    REGRESSION,
    LastOf,
    Net,
    Pool,
    Position,
    Residual,
    Task,
    Tied,
    layers,
    mlp,
    per_token,
    resnet,
    right_tokens,
)


class Latents(nn.Module):
    """A few learned queries that read all rows by cross attention, as in the Perceiver."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(count, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        return latents + self.attention(latents, x, x, need_weights=False)[0]


class Spectral(nn.Module):
    """A Fourier layer: the lowest modes are mixed by complex weights, beside a pointwise map."""

    def __init__(self, width: int, modes: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)
        self.point, self.modes = nn.Conv1d(width, width, 1), modes

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(x)[..., : self.modes]
        mixed = torch.einsum("bim,iom->bom", low, self.weight)
        return x + functional.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.point(x))


class Sine(nn.Module):
    """SIREN's layer, with its initialisation."""

    def __init__(self, n_in: int, n_out: int, first: bool = False) -> None:
        super().__init__()
        self.f, self.omega = nn.Linear(n_in, n_out), 10.0
        bound = 1 / n_in if first else math.sqrt(6 / n_in) / self.omega
        nn.init.uniform_(self.f.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.f(x))


class Denoiser(nn.Module):
    """Noise of a diffusion predicted from a noisy sample; time comes in beside depth, in the last column."""

    def __init__(self, n_in: int, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.time = nn.Linear(n_in, width), nn.Sequential(nn.Linear(1, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, n_in)

    def forward(self, given: Tensor) -> Tensor:
        x, time = self.stem(given[:, :-1]), self.time(given[:, -1:])
        for block in self.blocks:
            x = x + block(x + time)
        return self.head(x)


class Dilated(nn.Module):
    """A causal convolution over time, behind a skip."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.f, self.left = nn.Conv1d(width, width, 3, dilation=dilation), 2 * dilation

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.f(functional.pad(x, (self.left, 0))))


class Translator(nn.Module):
    """A sequence to a sequence by two GRUs: the second begins where the first ended."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(12, width), Position(8, width)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        _, last = self.encoder(self.embedding(tokens))
        asked = self.place(torch.zeros(len(tokens), 8, self.embedding.embedding_dim))
        return self.head(self.decoder(asked, last)[0])


class Sets(nn.Module):
    """Points one by one, then together: deep sets."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.all = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.all(self.each(x).amax(1))


class LinearRecurrence(nn.Module):
    """A diagonal linear recurrence over time, stable by its parametrisation, behind a norm and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.log_decay = nn.LayerNorm(width), nn.Parameter(torch.linspace(-3.0, 0.5, width))
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        u, decay = self.enter(self.norm(x)), torch.exp(-self.log_decay.exp())
        h = torch.zeros_like(u[:, 0])
        found = []
        for t in range(u.shape[1]):
            h = decay * h + (1 - decay) * u[:, t]
            found.append(h)
        return x + self.leave(functional.gelu(torch.stack(found, 1)))


def glorot(depth: int, act: type[nn.Module], gain: float) -> nn.Module:
    model = mlp(act, depth)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, gain)
            nn.init.zeros_(module.bias)
    return model


def kaiming(depth: int) -> nn.Module:
    model = mlp(nn.ReLU, depth)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def selu(depth: int = 6) -> nn.Module:
    model = mlp(nn.SELU, depth)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def linear(depth: int) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(depth)), nn.Linear(64, 10))
    for layer in model[:-1]:
        nn.init.orthogonal_(layer.weight)
    return model


def bounded(how: Any) -> nn.Module:
    """An MLP under a parametrisation of its weights, the head apart."""
    model = mlp(nn.ReLU, 3)
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            how(layer)
    return model


def quantised() -> nn.Module:
    return nn.Sequential(
        *(FakeQuantised(64, 64), nn.ReLU(), FakeQuantised(64, 64), nn.ReLU(), FakeQuantised(64, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )


def dropping(rate: float) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(3):
        parts += [nn.Linear(64 if not parts else 128, 128), nn.ReLU(), nn.Dropout(rate)]
    return nn.Sequential(*parts, nn.Linear(128, 10))


def convnet(*blocks: nn.Module, width: int = 16) -> nn.Module:
    return Net(nn.Conv2d(1, width, 3, padding=1), list(blocks), nn.Sequential(Pool(2, 3), nn.Linear(width, 10)))


def densely() -> nn.Module:
    blocks: list[nn.Module] = [Dense(8 + 8 * i, 8) for i in range(4)]
    return Net(nn.Conv2d(1, 8, 3, padding=1), blocks, nn.Sequential(nn.ReLU(), Pool(2, 3), nn.Linear(40, 10)))


def table(n_in: int, n_out: int, act: type[nn.Module] = nn.ReLU, depth: int = 2) -> nn.Module:
    """What people take for a small table."""
    return nn.Sequential(nn.Linear(n_in, 32), act(), *layers(depth, 32, act), nn.Linear(32, n_out))


def sequence(*blocks: nn.Module, width: int = 32) -> nn.Module:
    stem = nn.Sequential(nn.Linear(8, width), Position(8, width))
    return Net(stem, list(blocks), nn.Sequential(Pool(1), nn.Linear(width, 10)))


_TOKENS: dict[str, Any] = {"loss": per_token, "good": right_tokens}
TASKS: dict[str, Task] = {
    "mixture of experts": Task(lambda: Net(nn.Linear(64, 32), [Experts(32) for _ in range(3)], nn.Linear(32, 10))),
    "mixture of experts, best two": Task(
        lambda: Net(nn.Linear(64, 32), [Experts(32, best=2) for _ in range(3)], nn.Linear(32, 10))
    ),
    "graph convolution": Task(graph, steps=300, rate=1e-2),
    "graph attention": Task(lambda: graph(True), steps=200, rate=1e-2),
    "variational autoencoder": Task(
        Variational,
        "copy",
        evidence_bound,
        lambda out, y: REGRESSION["good"](out[:, :64], y.flatten(1)),
        0.6,
        steps=500,
    ),
    "denoising autoencoder": Task(
        lambda: nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 64)),
            nn.Unflatten(1, (1, 8, 8)),
        ),
        "noisy",
        least=0.7,
        steps=400,
        **REGRESSION,
    ),
    "normalising flow": Task(
        NormalisingFlow,
        "moons",
        negative_log_likelihood,
        lambda out, y: -float(negative_log_likelihood(out, y)),
        -2.3,
        steps=500,
    ),
    "fixed point": Task(lambda: nn.Sequential(FixedPoint(64, 48), nn.Linear(48, 10))),
    "decoder of tokens, tied": Task(Causal, "next", least=0.7, steps=400, **_TOKENS),
    "convnext": Task(lambda: convnet(*(ConvNext(16) for _ in range(4))), "image", steps=150, rate=1e-2),
    "siamese": Task(Siamese, "pairs", steps=600),
    "mlp tanh, glorot, 8": Task(lambda: glorot(8, nn.Tanh, 5 / 3), rate=1e-3),
    "mlp relu, kaiming, 10": Task(lambda: kaiming(10), rate=1e-3),
    "mlp sigmoid, glorot gain 4": Task(lambda: glorot(3, nn.Sigmoid, 4.0)),
    "mlp softplus": Task(lambda: mlp(nn.Softplus, 2)),
    "mlp hardswish": Task(lambda: mlp(nn.Hardswish, 2)),
    "mlp mish": Task(lambda: mlp(nn.Mish, 3)),
    "self-normalising": Task(selu),
    "deep linear, orthogonal": Task(lambda: linear(8), rate=1e-3),
    "logistic regression": Task(lambda: nn.Linear(64, 10), rate=1e-2),
    "sine layers": Task(
        lambda: nn.Sequential(Sine(1, 32, True), Sine(32, 32), Sine(32, 32), nn.Linear(32, 1)),
        "sine",
        rate=1e-3,
        steps=500,
        **REGRESSION,
    ),
    "maxout": Task(lambda: nn.Sequential(Maxout(64, 48), *(Maxout(48, 48) for _ in range(3)), nn.Linear(48, 10))),
    "spectral norm": Task(lambda: bounded(parametrizations.spectral_norm), rate=1e-2, steps=300),
    "weight norm": Task(lambda: bounded(parametrizations.weight_norm)),
    "quantised to 4 bits": Task(quantised),
    "dropout of a half": Task(lambda: dropping(0.5), steps=300),
    "stochastic depth": Task(
        lambda: Net(nn.Linear(64, 48), [DropPath(48, 0.3) for _ in range(6)], nn.Linear(48, 10)), steps=250
    ),
    "densely connected": Task(densely, "image", steps=120),
    "squeeze and excite": Task(lambda: convnet(*(SqueezeExcite(16) for _ in range(4))), "image", steps=120),
    "inverted bottlenecks": Task(lambda: convnet(*(Inverted(16) for _ in range(4))), "image", steps=120),
    "resnet instance norm": Task(lambda: resnet(4, nn.InstanceNorm2d), "image", steps=150),
    "reversible": Task(lambda: Net(nn.Linear(64, 48), [Reversible(24) for _ in range(5)], nn.Linear(48, 10))),
    "rk4, state and time": Task(lambda: Net(nn.Linear(64, 24), [RungeKutta(24)], nn.Linear(24, 10))),
    "euler, 16 steps": Task(lambda: Net(nn.Linear(64, 32), [Tied(32, 16)], nn.Linear(32, 10))),
    "antisymmetric": Task(lambda: Net(nn.Linear(64, 32), [Antisymmetric(32) for _ in range(8)], nn.Linear(32, 10))),
    "rezero": Task(lambda: Net(nn.Linear(64, 48), [ReZero(48) for _ in range(8)], nn.Linear(48, 10))),
    "gated transformer": Task(lambda: sequence(*(Gated(32) for _ in range(4))), "rows", steps=200),
    "latents": Task(lambda: sequence(Latents(32), Gated(32), Gated(32)), "rows", steps=250),
    "fourier layers": Task(
        lambda: Net(nn.Conv1d(1, 16, 1), [Spectral(16) for _ in range(3)], nn.Conv1d(16, 1, 1)),
        "waves",
        steps=400,
        **REGRESSION,
    ),
    "denoiser with time": Task(lambda: Denoiser(64), "diffusion", least=0.35, steps=600, **REGRESSION),
    "dilated over time": Task(
        lambda: nn.Sequential(
            nn.Conv1d(8, 32, 1), *(Dilated(32, 2**i) for i in range(3)), nn.Flatten(), nn.Linear(256, 10)
        ),
        "rows",
    ),
    "gru to gru": Task(Translator, "tokens", steps=600, rate=1e-2, **_TOKENS),
    "deep sets": Task(Sets, "points", least=0.85, steps=500),
    "linear recurrence": Task(lambda: sequence(*(LinearRecurrence(32) for _ in range(3))), "rows", steps=350),
    "lstm both ways": Task(
        lambda: nn.Sequential(LastOf(nn.LSTM, 24, bidirectional=True), nn.Linear(48, 10)), "rows", rate=1e-2
    ),
    "convolutions, then lstm": Task(
        lambda: nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), LastOf(nn.LSTM), nn.Linear(48, 10)),
        "rows",
        rate=1e-2,
    ),
    "residual mlp, batch norm": Task(
        lambda: Net(
            nn.Linear(64, 48),
            [Residual(nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48)) for _ in range(6)],
            nn.Linear(48, 10),
        )
    ),
    "wine": Task(lambda: table(13, 3), "wine"),
    "breast cancer": Task(lambda: table(30, 2), "cancer"),
    "iris": Task(lambda: table(4, 3, nn.Tanh), "iris", rate=1e-2),
    "moons": Task(lambda: table(2, 2, nn.Tanh), "moons", rate=1e-2, steps=300),
    "circles": Task(lambda: table(2, 2), "circles", rate=1e-2, steps=300),
    "friedman, elu": Task(lambda: table(10, 1, nn.ELU), "friedman", least=0.85, rate=1e-2, steps=300, **REGRESSION),
    "friedman, layer norm": Task(
        lambda: nn.Sequential(nn.Linear(10, 32), *layers(4, 32, nn.GELU, True), nn.Linear(32, 1)),
        "friedman",
        least=0.85,
        steps=400,
        **REGRESSION,
    ),
}
