"""What a pinned model is, and the parts that several of them have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit

F64 = torch.float64


F32 = torch.float32


@dataclass
class Subject:
    """A model and its flow.

    Attributes:
        flow: makes it anew.
        dtype: of its numbers.
        call: model, inputs and keyword arguments of `stabkit.analyze`; None where the flow is a map over time.
        loss: a scalar of the output; None for random cotangents alone.
        options: of `stabkit.analyze`.
        large: its Jacobians are too large to be written down.
    """

    flow: Callable[[], Any]
    dtype: torch.dtype = F64
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    loss: Callable[[Any], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    large: bool = False


MODELS: dict[str, Callable[[], Subject]] = {}


def pinned(make: Callable[[], Subject]) -> Callable[[], Subject]:
    MODELS[make.__name__] = make
    return make


def traced(
    model: Any,
    *inputs: Any,
    dtype: torch.dtype = F64,
    loss: Callable[[Any], Tensor] | None = None,
    large: bool = False,
    train: bool = False,
    kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Subject:
    """A network that is traced over its depth."""
    kwargs = kwargs or {}
    model = model.to(dtype).train(train)
    given = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    if large:
        options = {"spectrum": "none", "probes": 2} | options
    return Subject(
        lambda: stabkit.trace(model, *given, kwargs=kwargs), dtype, (model, given, kwargs), loss, options, large
    )


def classes(count: int) -> Callable[[Any], Tensor]:
    def loss(output: Any) -> Tensor:
        logits = getattr(output, "logits", output)
        logits = logits.reshape(-1, logits.shape[-1])
        return functional.cross_entropy(logits, torch.arange(len(logits)) % count)

    return loss


def mean_square(output: Any) -> Tensor:
    return getattr(output, "logits", output).square().mean()


class Residual(nn.Module):
    """x + h W tanh(V x)."""

    def __init__(self, width: int = 8, h: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.h = h
        with torch.no_grad():
            for p in self.f.parameters():
                p.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.h * self.f(x)


class Loop(nn.Module):
    """Fields in a loop that is given."""

    def __init__(self, loop: Callable[[Any, Tensor], Tensor], *fields: nn.Module) -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self.fields, x)


def tanh_fields(count: int = 5, width: int = 6) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]


def plain(depth: int, width: int, activation: Callable[[], nn.Module] = nn.Tanh, gain: float = 1.0) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.orthogonal_(layer.weight, gain)
        parts += [layer, activation()]
    return nn.Sequential(*parts)
