"""Small networks and a training loop, with and without a monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabkit.monitor import Monitor


def mlp(width: int = 8, depth: int = 3, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for _ in range(depth):
        parts += [nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(width, 2))


def capsule_mlp() -> nn.Module:
    """The factory that capsules name."""
    return mlp(dropout=0.2)


class Residual(nn.Module):
    """A convolution with batch norm whose output is changed in place by what follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Residual(2) for _ in range(3)])
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu_(layer(x))
        return self.head(x.mean((2, 3)))


class Layer(nn.Module):
    """A residual layer that returns a tensor, a tuple or a mapping."""

    def __init__(self, width: int, returns: str = "tensor") -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        y = x + 0.5 * torch.tanh(self.inner(x))
        return {"tensor": y, "tuple": (y, None), "mapping": {"hidden": y, "extra": 3}}[self.returns]


class Layers(nn.Module):
    """A stack of layers; ``how`` may be a kind of activation checkpoint."""

    def __init__(self, how: str = "plain", returns: str = "tensor", width: int = 6, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(width, returns) for _ in range(depth)])
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            plain = self.how == "plain"
            x = layer(x) if plain else checkpoint(layer, x, use_reentrant=self.how == "reentrant")
            if isinstance(x, tuple):
                x = x[0]
            if isinstance(x, dict):
                x = x["hidden"]
        return x


class LastStep(nn.Module):
    """A recurrent network, of which the last output counts."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.LSTM(width, width, batch_first=True) for _ in range(depth)])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x[:, -1])


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def train(
    model: nn.Module,
    draw: Callable[[], Tensor],
    steps: int = 4,
    watch: Callable[[nn.Module, torch.optim.Optimizer], Monitor] | None = None,
) -> tuple[list[Tensor], Monitor | None]:
    """The weights after some steps of training, and the monitor if there was one."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = None if watch is None else watch(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model(draw()).square().mean()
        loss.backward()
        if monitor is not None:
            monitor.step(loss)
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return weights(model), monitor


def hooks_of(model: nn.Module) -> int:
    """How many hooks the modules of a model carry."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
