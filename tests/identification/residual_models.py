"""Networks of one state: plain, residual, damped, scaled, random, and of several columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .family import Family, Step, constant, conv, dense, stack

IMAGE = (2, 4, 5, 5)


def sizes() -> Tensor:
    return nn.Parameter(torch.linspace(0.1, 0.6, 6, dtype=torch.float64))


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def post_activation() -> nn.Module:
    """He et al. 2016a: the addition is followed by ReLU."""
    layers = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
    ]
    return Step(lambda m, x: torch.relu(x + m.parts[0](x)), nn.Sequential(*layers))


def bottleneck() -> nn.Module:
    layers = [
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Conv2d(2, 4, 1),
    ]
    return Step(lambda m, x: m.parts[0](x) + x, nn.Sequential(*layers))


def squeeze_excite() -> nn.Module:
    def forward(m, x):
        y = m.parts[0](x)
        gate = torch.sigmoid(m.parts[1](y.mean(dim=(2, 3), keepdim=True)))
        return x + y * gate

    return Step(forward, conv(), nn.Conv2d(4, 4, 1))


def in_place() -> nn.Module:
    def forward(m, x):
        y = m.parts[0](x)
        y *= 0.5
        y += x
        return y

    return Step(forward, dense())


def channels_last() -> nn.Module:
    """ConvNeXt's way: depthwise convolution, then linear layers over the channels, LayerScale and dropout."""

    def forward(m, x):
        y = m.parts[0](x).permute(0, 2, 3, 1)
        y = m.parts[1](y)
        y = m.gamma * y
        return x + m.parts[2](y.permute(0, 3, 1, 2))

    pointwise = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return Step(forward, nn.Conv2d(4, 4, 3, padding=1, groups=4), pointwise, nn.Dropout(0.1),
                gamma=nn.Parameter(torch.linspace(0.1, 0.4, 4, dtype=torch.float64)))  # fmt: skip


class DropPath(nn.Module):
    """Stochastic depth as common implementations write it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        chances = x.new_tensor([1.0, 0.0] * (len(x) // 2)).reshape(-1, *[1] * (x.dim() - 1))  # draws of a known result
        mask = chances.bernoulli()
        return x * mask / self.p


def fractal() -> nn.Module:
    def column() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    return Step(
        lambda m, x: torch.stack([m.parts[0](x), m.parts[2](m.parts[1](x))]).mean(0), column(), column(), column()
    )


class Densely(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 + 3 * i, 3) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], dim=1)
        return x


def densely():
    return Densely().double(), (torch.randn(2, 4, dtype=torch.float64),), {}


def diffusion() -> nn.Module:
    """GRAND-like (Chamberlain et al. 2021): x' = x + h (A(x) - I) x, A from attention."""

    def forward(m, x):
        attention = torch.softmax(m.parts[0](x) @ m.parts[1](x).mT, dim=-1)
        return x + 0.2 * (attention @ x - x)

    return Step(forward, nn.Linear(6, 6), nn.Linear(6, 6))


def projection() -> nn.Module:
    return Step(lambda m, x: m.parts[1](m.parts[2](x)) + m.parts[0](x), conv(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def polynet() -> nn.Module:
    def forward(m, x):
        y = m.parts[0](x)
        return x + y + m.parts[0](y)

    return Step(forward, dense())


def euler(z):
    return 1 + z


FAMILIES = (
    Family("plain MLP", "plain", stack(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh())), constant(lambda z: z)),
    Family("plain CNN", "plain", stack(conv, IMAGE), constant(lambda z: z)),
    Family("pre-activation ResNet", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.parts[0](x), conv()), IMAGE), constant(euler)),
    Family("bottleneck", "forward Euler", stack(bottleneck, IMAGE), constant(euler)),
    Family("post-activation ResNet", "projected Euler (ReLU)", stack(post_activation, IMAGE), constant(euler)),
    Family("squeeze and excite", "forward Euler", stack(squeeze_excite, IMAGE), constant(euler)),
    Family("projection shortcut", "linear skip", stack(projection, IMAGE), None),
    Family("in-place operations", "forward Euler", stack(in_place), constant(lambda z: 1 + 0.5 * z)),
    Family("ReZero", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.alpha * m.parts[0](x), dense(), alpha=number(0.2))),
           constant(lambda z: 1 + torch.tensor(0.2).item() * z)),
    Family("ReZero at its start", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.alpha * m.parts[0](x), dense(), alpha=number(0.0))),
           constant(lambda z: 1 + 0 * z)),
    Family("SkipInit, 1/sqrt(L)", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.parts[0](x) / 3**0.5, dense())), constant(lambda z: 1 + z / 3**0.5)),
    Family("LayerScale", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.gamma * m.parts[0](x), dense(), gamma=sizes())),
           constant(euler)),
    Family("ConvNeXt-like", "forward Euler", stack(channels_last, IMAGE), constant(euler)),
    Family("stochastic depth, eval", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.parts[1](m.parts[0](x)), dense(), DropPath(0.8))), constant(euler)),
    Family("stochastic depth, train", "forward Euler, stochastic depth (p = 0.8)",
           stack(lambda: Step(lambda m, x: x + m.parts[1](m.parts[0](x)), dense(), DropPath(0.8)), train=True), None),
    Family("dropout in train mode", "forward Euler",
           stack(lambda: Step(lambda m, x: x + m.parts[1](m.parts[0](x)), dense(), nn.Dropout(0.3)), train=True),
           constant(euler)),
    Family("In-ResNet", "damped Euler (a = 0.78)",
           stack(lambda: Step(lambda m, x: m.parts[0](x) + (1 - functional.relu(1 - m.k)) * x, conv(), k=number(0.78)),
                 IMAGE),
           constant(lambda z: torch.tensor(0.78).item() + z)),
    Family("lambda-In-ResNet", "damped Euler (a = 0.775)",
           stack(lambda: Step(lambda m, x: (1 + functional.relu(m.k)) * m.parts[0](x) + (1 - functional.relu(m.k)) * x,
                              conv(), k=number(0.225)), IMAGE),
           constant(lambda z: 1 - torch.tensor(0.225).item() + (1 + torch.tensor(0.225).item()) * z)),
    Family("PolyNet poly-2", "PolyNet (poly-2)", stack(polynet), constant(lambda z: 1 + z + z * z)),
    Family("PolyNet mpoly-2", "PolyNet (mpoly-2)",
           stack(lambda: Step(lambda m, x: x + (y := m.parts[0](x)) + m.parts[1](y), dense(), dense())),
           constant(lambda a, b: 1 + a + a * b)),
    Family("FractalNet", "plain", stack(fractal, IMAGE), constant(lambda a, b, c: a / 2 + b * c / 2)),
    Family("DenseNet", "dense (concatenation)", densely, constant(lambda z: [[1, 0], [z, 1]])),
    Family("GRAND-like diffusion", "damped Euler (a = 0.8)", stack(diffusion, (2, 5, 6)),
           constant(lambda z: 0.8 + 0.2 * z)),
)  # fmt: skip
