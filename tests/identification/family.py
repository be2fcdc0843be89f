"""One family: a model, and what should be read off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[Any, tuple[Tensor, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        name: of the family.
        expected: the name that the reading should have.
        build: model, inputs and keyword arguments of `trace`.
        truth: from the flow and the reading, the stability matrix as the code of the model says it; None where there
            is no method.
        which: the record that is compared.
    """

    name: str
    expected: str
    build: Callable[[], Built]
    truth: Callable[..., Callable[..., Any]] | None
    which: int = 1


class Step(nn.Module):
    """A block whose forward is a function of it and the state."""

    def __init__(self, function: Callable[..., Any], *parts: Any, **named: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(p for p in parts)
        for name, value in named.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, *state: Any) -> Any:
        return self.function(self, *state)


def dense(width: int = 6) -> nn.Module:
    """A field of two layers."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def conv(channels: int = 4) -> nn.Module:
    """BN-ReLU-conv, twice."""
    half = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    other = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    return nn.Sequential(*half, *other)


def stack(
    make: Callable[[], nn.Module], shape: Sequence[int] = (2, 6), depth: int = 3, *, train: bool = False
) -> Callable[[], Built]:
    """Some blocks in a row, in float64."""

    def build() -> Built:
        model = nn.Sequential(*(make() for _ in range(depth))).double()
        return model.train(train), (torch.randn(*shape, dtype=torch.float64),), {}

    return build


def constant(function: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """A truth that does not depend on what was read."""
    return lambda flow, record: function
