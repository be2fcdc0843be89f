"""One architecture as its paper's repository writes it, and what a right reading of it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.identification import Identification, identify
from stabkit.tracing import iterate, trace

_STRUCTURE = re.compile(r"fork|join|transition")  # a method begins or ends, or the space changes: none is named
_SILENT = re.compile(r"unknown|unnamed|not a step")


@dataclass(frozen=True)
class Paper:
    """An architecture.

    Attributes:
        name: of the architecture.
        build: makes the records, given a scale of the input and a dtype.
        right: a pattern of the right name.
        partly: a pattern of a name that says a part of it.
        h: the right step size, where the code has one.
        which: the record that the row is about; None for the one in the middle.
    """

    name: str
    build: Callable[[float, torch.dtype], tuple[Identification, ...]]
    right: str
    partly: str = ""
    h: float | None = None
    which: int | None = None

    def record(self, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Identification:
        """What is read off the step that the row is about."""
        torch.manual_seed(seed)
        records = self.build(scale, dtype)
        return records[len(records) // 2 if self.which is None else self.which]

    def verdict(self, found: Identification) -> str:
        """R right, P partly, W wrong though proven or measured, U an honest unknown."""
        if re.search(self.right, found.name):
            fits = self.h is None or (found.step_size is not None and abs(found.step_size - self.h) < 1e-3 * self.h)
            return "R" if fits else "P"
        if self.partly and re.search(self.partly, found.name):
            return "P"
        if _STRUCTURE.match(found.name) or (found.evidence != "proven" and _SILENT.match(found.name)):
            return "U"
        return "W" if found.evidence in ("proven", "measured") else "U"


@dataclass(frozen=True)
class Repeated:
    """A row whose model is some blocks after each other, traced."""

    make: Callable[[], nn.Module]
    given: Callable[[], Tensor]
    depth: int = 3
    batch_dim: int | None = 0
    train: bool = False

    def __call__(self, scale: float, dtype: torch.dtype) -> tuple[Identification, ...]:
        model = self.make() if self.depth == 1 else nn.Sequential(*(self.make() for _ in range(self.depth)))
        model.to(dtype).train(self.train)
        x = self.given()
        x = x.to(dtype) * scale if x.is_floating_point() else x
        return identify(trace(model, x, batch_dim=self.batch_dim))


@dataclass(frozen=True)
class Iterated:
    """A row whose model is one cell, iterated over time."""

    make: Callable[[], nn.Module]
    states: int
    width: int = 6
    inputs: int = 3

    def __call__(self, scale: float, dtype: torch.dtype) -> tuple[Identification, ...]:
        cell = self.make().to(dtype)
        x0 = tuple(torch.randn(2, self.width).to(dtype) * scale for _ in range(self.states))
        drive = torch.randn(4, 2, self.inputs).to(dtype) * scale
        return identify(iterate(cell, x0 if self.states > 1 else x0[0], 4, inputs=drive))


class Block(nn.Module):
    """A block whose forward is a function of it and the state."""

    def __init__(self, function: Callable[..., Any], parts: Sequence[nn.Module], named: dict[str, Any]) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleList(parts), function
        for name, value in named.items():
            new = nn.Parameter(torch.randn(value) / max(value) ** 0.5) if isinstance(value, tuple) else value
            setattr(self, name, new)

    def forward(self, *state: Any) -> Any:
        return self.function(self, *state)


def block(
    function: Callable[..., Any], *parts: Callable[[int], nn.Module], width: int = 8, **named: Any
) -> Callable[[], nn.Module]:
    """Makes blocks with the given parts; tuples are shapes of parameters."""
    return lambda: Block(function, [make(width) for make in parts], named)


def mlp(width: int) -> nn.Module:
    """A field of two layers."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def conv_branch(channels: int) -> nn.Module:
    """BN-ReLU-conv, twice."""
    half = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    other = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    return nn.Sequential(*half, *other)
