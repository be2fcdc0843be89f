"""Networks that learn: kinds of networks, each with data, a loss, and the score from which it has learned.

Data are scikit-learn's digits as images, rows of pixels or tokens, its small tables, and tasks of sequences and
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class LastOf(nn.Module):
    """What a recurrent layer says at the end of a sequence."""

    def __init__(self, cell: type[nn.RNNBase], width: int = 48, layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.rnn = cell(8, width, layers, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Pool(nn.Module):
    """Mean over positions or tokens."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Position(nn.Module):
    """Adds what tells positions apart."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Mixer(nn.Module):
    """An MLP-mixer block."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Tied(nn.Module):
    """One field, several explicit Euler steps."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.f, self.steps = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)), steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x + self.f(x) / self.steps
        return x


class Highway(nn.Module):
    """A gate between its input and a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.h = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate(x) - 1.0)
        return g * torch.relu(self.h(x)) + (1 - g) * x


class UNet(nn.Module):
    """Down, up, and skips across."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.SiLU())

        self.down1, self.down2, self.middle = block(1, width), block(width, 2 * width), block(2 * width, 2 * width)
        self.up2, self.up1, self.out = block(4 * width, width), block(2 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.avg_pool2d(a, 2))
        c = self.middle(functional.avg_pool2d(b, 2))
        c = self.up2(torch.cat([functional.interpolate(c, scale_factor=2.0), b], 1))
        return self.out(self.up1(torch.cat([functional.interpolate(c, scale_factor=2.0), a], 1)))


class Net(nn.Sequential):
    """A Sequential of named parts."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head


@dataclass(frozen=True)
class Task:
    """A network and what it is trained to.

    Attributes:
        make: the network.
        data: inputs and targets.
        loss: of output and target.
        good: the score that counts as learned, of output and target; larger is better.
        least: that score.
        rate: of Adam.
        steps: of training.
        fresh: what is rightly said of it before training, if anything: its growth is out of range, and the remedy
            trains better. Adam learns it all the same.
    """

    make: Callable[[], nn.Module]
    data: str = "flat"
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    good: Callable[[Tensor, Tensor], float] = lambda out, y: float((out.argmax(1) == y).float().mean())
    least: float = 0.9
    rate: float = 3e-3
    steps: int = 150
    fresh: str = ""


_TABLES = {
    "wine": datasets.load_wine,
    "cancer": datasets.load_breast_cancer,
    "iris": datasets.load_iris,
    "moons": lambda: datasets.make_moons(512, noise=0.1, random_state=0),
    "circles": lambda: datasets.make_circles(512, noise=0.05, factor=0.5, random_state=0),
    "friedman": lambda: datasets.make_friedman1(512, random_state=0),
}


def data(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets by name; inputs of unit scale."""
    if name in _TABLES:
        found = _TABLES[name]()
        x, y = found if isinstance(found, tuple) else (found.data, found.target)
        x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
        if name == "friedman":
            return x, torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
        return x[order := torch.randperm(len(x), generator=torch.Generator().manual_seed(0))], torch.tensor(y)[order]
    generator = torch.Generator().manual_seed(0)
    if name == "tokens":
        tokens = torch.randint(0, 12, (512, 8), generator=generator)
        return tokens, tokens.flip(1)
    if name == "next":  # sequences that count in steps of their own
        start, step = torch.randint(0, 12, (2, 512, 1), generator=generator)
        tokens = (start + step * torch.arange(13)) % 12
        return tokens[:, :-1], tokens[:, 1:]
    if name == "sine":
        t = torch.linspace(-3, 3, 512)[:, None]
        return t, torch.sin(3 * t)
    if name == "diffusion":  # digits with noise, and the time at which they have so much; the noise
        digits = data("flat")[0]
        time = torch.rand(len(digits), 1, generator=generator)
        noise = torch.randn(digits.shape, generator=generator)
        return torch.cat([(1 - time).sqrt() * digits + time.sqrt() * noise, time], dim=1), noise
    if name == "waves":  # a smooth function on a grid, and its derivative
        phase, height = torch.rand(2, 512, 3, 1, generator=generator)
        k, t = torch.tensor([[1.0], [2.0], [3.0]]), torch.arange(32) / 32 * 2 * torch.pi
        wave = k * t + 2 * torch.pi * phase
        return (height * wave.sin()).sum(1, keepdim=True), (height * k * wave.cos()).sum(1, keepdim=True) / 2
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    x = (x - x.mean()) / x.std()
    if name in ("copy", "pairs", "noisy"):
        if name == "copy":
            return x[:, None], x[:, None]
        if name == "noisy":
            return (x + 0.5 * torch.randn(x.shape, generator=generator))[:, None], x[:, None]
        other = torch.where(torch.rand(len(x), generator=generator) < 0.5, _alike(y), torch.randperm(len(x)))
        return torch.stack([x.flatten(1), x[other].flatten(1)], 1), (y == y[other]).long()
    return {"flat": x.flatten(1), "rows": x, "image": x[:, None], "points": _points(x)}[name], y


def _alike(y: Tensor) -> Tensor:
    """For every sample another of its class."""
    other = torch.empty_like(y)
    for label in y.unique():
        same = (y == label).nonzero().squeeze(1)
        other[same] = same.roll(1)
    return other


def _points(x: Tensor) -> Tensor:
    """Images as sets of 24 bright points: their places."""
    where = x.flatten(1).topk(24, dim=1).indices
    return torch.stack([where // 8, where % 8], dim=2).float().sub(3.5).div(2.3)


def layers(depth: int, width: int, act: type[nn.Module], norm: bool = False) -> list[nn.Module]:
    found: list[nn.Module] = []
    for _ in range(depth):
        found += [nn.Linear(width, width), *([nn.LayerNorm(width)] if norm else []), act()]
    return found


def mlp(act: type[nn.Module], depth: int = 4, norm: bool = False, width: int = 64) -> nn.Module:
    """Layers of torch at their default initialisation."""
    return nn.Sequential(nn.Linear(64, width), act(), *layers(depth, width, act, norm), nn.Linear(width, 10))


def resnet(depth: int, norm: type[nn.Module], zero: bool = False) -> nn.Module:
    """A residual network of images."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        last = nn.Conv2d(16, 16, 3, padding=1)
        if zero:
            nn.init.zeros_(last.weight)
        made = [nn.GroupNorm(4, 16) if norm is nn.GroupNorm else norm(16) for _ in range(2)]
        blocks.append(Residual(made[0], nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), made[1], nn.ReLU(), last))
    return Net(nn.Conv2d(1, 16, 3, padding=1), blocks, nn.Sequential(Pool(2, 3), nn.Linear(16, 10)))


def plain_cnn(norm: bool) -> nn.Module:
    """Convolutions that widen as they go."""
    parts: list[nn.Module] = []
    for n_in, n_out in ((1, 16), (16, 32), (32, 32)):
        parts += [nn.Conv2d(n_in, n_out, 3, padding=1), *([nn.BatchNorm2d(n_out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def encoder(norm_first: bool, tokens: bool = False) -> nn.Module:
    """torch's transformer encoder, of rows of pixels or of tokens."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
    stem: nn.Module = nn.Embedding(12, 32) if tokens else nn.Linear(8, 32)
    head = nn.Linear(32, 12) if tokens else nn.Sequential(Pool(1), nn.Linear(32, 10))
    return nn.Sequential(
        stem, Position(8, 32), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.LayerNorm(32), head
    )


def per_token(out: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, 1), y.flatten())


def right_tokens(out: Tensor, y: Tensor) -> float:
    return float((out.argmax(-1) == y).float().mean())


def explained(out: Tensor, y: Tensor) -> float:
    return 1.0 - float((out - y).square().mean() / (y - y.mean()).square().mean())


REGRESSION: dict[str, Any] = {"loss": functional.mse_loss, "good": explained}
TASKS: dict[str, Task] = {
    "mlp relu": Task(lambda: mlp(nn.ReLU)),
    "mlp relu, no hidden peers": Task(lambda: mlp(nn.ReLU, 1)),
    "mlp tanh": Task(lambda: mlp(nn.Tanh)),
    "mlp sigmoid, two layers": Task(lambda: mlp(nn.Sigmoid, 1), rate=1e-2, steps=250),
    "mlp gelu, layer norm, 8": Task(lambda: mlp(nn.GELU, 8, True)),
    "mlp silu": Task(lambda: mlp(nn.SiLU)),
    "mlp elu": Task(lambda: mlp(nn.ELU)),
    "mlp leaky relu, 8": Task(lambda: mlp(nn.LeakyReLU, 8), fresh="vanishing"),
    "mlp that narrows": Task(
        lambda: nn.Sequential(
            nn.Linear(64, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    ),
    "residual mlp, layer norm": Task(
        lambda: Net(
            nn.Linear(64, 48),
            [Residual(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(8)],
            nn.Linear(48, 10),
        )
    ),
    "residual mlp, no norm": Task(
        lambda: Net(
            nn.Linear(64, 48),
            [Residual(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)) for _ in range(6)],
            nn.Linear(48, 10),
        ),
        rate=1e-3,
    ),
    "highway": Task(lambda: Net(nn.Linear(64, 48), [Highway(48) for _ in range(8)], nn.Linear(48, 10))),
    "euler, one field": Task(lambda: Net(nn.Linear(64, 32), [Tied(32, 8)], nn.Linear(32, 10))),
    "cnn plain": Task(lambda: plain_cnn(False), "image"),
    "cnn batch norm": Task(lambda: plain_cnn(True), "image", steps=80),
    "resnet batch norm": Task(lambda: resnet(6, nn.BatchNorm2d), "image", steps=80),
    "resnet group norm": Task(lambda: resnet(6, nn.GroupNorm), "image", steps=100),
    "resnet zero branches": Task(lambda: resnet(6, nn.GroupNorm, True), "image", steps=120),
    "mixer": Task(
        lambda: Net(nn.Linear(8, 32), [Mixer(8, 32) for _ in range(4)], nn.Sequential(Pool(1), nn.Linear(32, 10))),
        "rows",
    ),
    "transformer pre-norm": Task(lambda: encoder(True), "rows"),
    "transformer post-norm": Task(lambda: encoder(False), "rows", rate=1e-3, steps=250),
    "transformer of tokens": Task(
        lambda: encoder(True, True),
        "tokens",
        per_token,
        right_tokens,
        steps=300,
    ),
    "rnn tanh": Task(lambda: nn.Sequential(LastOf(nn.RNN), nn.Linear(48, 10)), "rows", steps=200),
    "lstm": Task(lambda: nn.Sequential(LastOf(nn.LSTM), nn.Linear(48, 10)), "rows", rate=1e-2),
    "gru, two layers": Task(lambda: nn.Sequential(LastOf(nn.GRU, 48, 2), nn.Linear(48, 10)), "rows", rate=1e-2),
    "unet autoencoder": Task(UNet, "copy", rate=1e-2, **REGRESSION),
    "bottleneck autoencoder": Task(
        lambda: nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 48), nn.ReLU()),
            *(nn.Linear(48, 64), nn.Unflatten(1, (1, 8, 8))),
        ),
        "copy",
        least=0.7,
        steps=300,
        **REGRESSION,
    ),
    "function of one variable": Task(
        lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)),
        "sine",
        rate=1e-2,
        steps=600,
        **REGRESSION,
    ),
}
