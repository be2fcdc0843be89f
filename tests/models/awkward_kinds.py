"""What kinds of awkward models are made of."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Awkward:
    """A model, what it is called with, and what else must be left alone; ``step`` may be iterated."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    step: Callable[[Tensor], Tensor] | None = None


CASES: dict[str, Callable[[], Awkward]] = {}
WIDTH = 4


class Net(nn.Module):
    """x + tanh(W x), twice, around what a kind of model does; then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.setup()

    def setup(self) -> None:
        """What a kind holds beside its layers."""

    def touch(self, h: Tensor) -> Tensor | None:
        """What it does whenever it runs; the new state, or None."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        made = self.touch(x)
        x = x if made is None else made
        return self.head(x + self.second(x).tanh())


def case(name: str, build: Callable[[], Awkward | Any]) -> None:
    """Under a name, what builds a model, or one with all else."""

    def made() -> Awkward:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        found = build()
        found = found if isinstance(found, Awkward) else Awkward(found, (torch.randn(3, WIDTH),))
        if found.step is None and isinstance(found.model, Net):
            found.step = found.model
        return found

    assert name not in CASES
    CASES[name] = made


def kind(name: str, setup: Callable[[Any], Any], touch: Callable[[Any, Tensor], Any], **more: Any) -> None:
    """A `Net` with this setup and touch; ``more`` are further attributes of its class."""

    def returned(self: Any, h: Tensor) -> Tensor | None:
        made = touch(self, h)
        return made if isinstance(made, Tensor) else None

    body = {"setup": lambda self: setup(self) and None, "touch": returned, **more}
    case(name, lambda: types.new_class("Kind", (Net,), exec_body=lambda space: space.update(body))())


def put(**attributes: Callable[[], Any]) -> Callable[[Any], None]:
    """A setup that makes attributes."""

    def setup(self: Any) -> None:
        for name, make in attributes.items():
            setattr(self, name, make())

    return setup


def nothing(self: Any) -> None:
    """No setup."""


def off_graph(function: Callable[[Any], Any]) -> Callable[[Any, Tensor], None]:
    """A touch without gradients."""

    def touch(self: Any, _: Tensor) -> None:
        with torch.no_grad():
            function(self)

    return touch


class Cache:
    """Keys and values, layer by layer, as language models keep them."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = [torch.zeros(3, 2, WIDTH)]
        self.seen = 0

    def update(self, h: Tensor) -> None:
        self.keys[0] = torch.cat([self.keys[0], h.detach().unsqueeze(1)], dim=1)
        self.seen += 1


def dropped(draw: Callable[[Any], float]) -> Callable[[Any, Tensor], Tensor]:
    """The state, kept or halved by a coin."""
    return lambda self, h: h * (1.0 if draw(self) < 0.5 else 0.5)
