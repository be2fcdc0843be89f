"""Builders of subjects: a model and its inputs, drawn with the seed of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .hard_models import Stack, Wrapped
from .zoo import Built

THREE_BLOCKS: dict[str, Any] = {"steps": 3, "blocks": "Residual"}


def x(*shape: int) -> Tensor:
    """A random float input."""
    return torch.randn(*shape)


def built(make: Callable[[], Any], *inputs: Callable[[], Any], train: bool | None = False, **kwargs: Any) -> Any:
    """A builder: the model in eval mode (or train mode, or as made), and its inputs drawn after it."""

    def build() -> Built:
        model = make()
        if isinstance(model, nn.Module) and train is not None:
            model.train(train)
        return model, tuple(make_input() for make_input in inputs), {k: v() for k, v in kwargs.items()}

    return build


def on(*shape: int) -> Callable[[], Tensor]:
    """A random float input of a shape."""
    return lambda: x(*shape)


def stack(run: Callable[[nn.Module, Tensor], Tensor] | None = None, **options: Any) -> Any:
    """A builder of a stack of three residual blocks that are run in an unusual way."""
    return built(lambda: Stack(run), on(2, 4), **options)


def wrapped(call: Callable[..., Any], *inputs: Callable[[], Any], **options: Any) -> Any:
    """A builder of a stack of three residual blocks that is called in an unusual way."""
    return built(lambda: Wrapped(call), *(inputs or (on(2, 4),)), **options)


def chain(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A maker of a Sequential."""
    return lambda: nn.Sequential(*(make() for make in modules))
