"""Models of the losses without an end."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), act()]
    return nn.Sequential(*layers[:-1])


class MultiTask(nn.Module):
    """Two heads on a trunk, and a number for each loss."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.trunk, self.age, self.kind = mlp(12, 64, 64), nn.Linear(64, 1), nn.Linear(64, 5)
        self.task_weights = nn.Parameter(torch.full((2,), start))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.trunk(x))
        return self.age(h), self.kind(h), self.task_weights


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(36, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.fc3, self.fc4 = nn.Linear(8, 64), nn.Linear(64, 36)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(x))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


class Coupling(nn.Module):
    def __init__(self, dim: int, swap: bool) -> None:
        super().__init__()
        self.net, self.swap = mlp(dim // 2, 32, dim), swap

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        if self.swap:
            a, b = b, a
        s, t = self.net(a).chunk(2, -1)
        b = b * torch.exp(s) + t
        return torch.cat([b, a] if self.swap else [a, b], -1), s.sum(-1)


class Flow(nn.Module):
    def __init__(self, dim: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(dim, i % 2 == 1) for i in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for layer in self.layers:
            x, part = layer(x)
            log_det = log_det + part
        return x, log_det


class Density(nn.Module):
    """The log-density itself, as flow libraries return it."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.flow, self.sign = Flow(), sign

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.flow(x)
        prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
        return prior + self.sign * log_det


class Autoencoder(nn.Module):
    """A VAE that returns its loss, with or without the minus before half of the sum."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.encode, self.mean, self.log_var = nn.Conv2d(1, 8, 4, 2, 1), nn.Linear(288, 6), nn.Linear(288, 6)
        self.decode, self.sign = nn.Linear(6, 144), sign

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.encode(x)).flatten(1)
        mu, log_var = self.mean(h), self.log_var(h)
        z = mu + torch.randn_like(mu) * (log_var / 2).exp()
        kl = self.sign * 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1).mean()
        return F.mse_loss(self.decode(z).view_as(x), x) * 144 + kl


class ActNorm(nn.Module):
    """A flow of scales that are parameters, between linear shifts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scales = nn.ParameterList(torch.zeros(dim) for _ in range(3))
        self.shifts = nn.ModuleList(mlp(dim // 2, 24, dim // 2, act=nn.Tanh) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det: Any = 0
        for log_scale, shift in zip(self.log_scales, self.shifts, strict=True):
            x = x * log_scale.exp()
            log_det = log_det + log_scale.sum().expand(len(x))
            a, b = x.chunk(2, 1)
            x = torch.cat([b + shift(a), a], 1)
        return x, log_det


class Pixels(nn.Module):
    """A flow whose scales lie between zero and one, as Glow has them."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(8, 32, 16) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for net in self.nets:
            a, b = x.chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            s = torch.sigmoid(s + 2)
            x, log_det = torch.cat([(b + t) * s, a], 1), log_det + s.log().sum(1)
        return x, log_det
