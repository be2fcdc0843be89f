"""A limit on what a config may make a library build."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from stabkit.errors import CheckpointError
from stabkit.tracing.recording.hooks import hooked

_MODULES = 32  # for each tensor that is stored; a layer of transformers has at most five
_NUMBERS = 16  # for each number that is stored; tying registers a parameter anew, loading does it again
_FREE_MODULES, _FREE_NUMBERS = 2000, 2**24


@contextlib.contextmanager
def bounded_by(tensors: Mapping[str, Tensor], what: str) -> Iterator[None]:
    """While it lasts, no model may grow that is out of all proportion to the weights that it is for.

    A config of a hundred bytes can ask for a million million layers, which would take all time and memory.

    Args:
        tensors: the weights.
        what: what describes the model, for the message.

    Raises:
        CheckpointError: a model outgrows them.

    Example:
        >>> import torch
        >>> with bounded_by({"w": torch.ones(1)}, "config.json"):
        ...     model = nn.Sequential(*(nn.ReLU() for _ in range(3000)))
        Traceback (most recent call last):
            ...
        stabkit.errors.CheckpointError: config.json describes a model of more than 2032 modules, but 1 tensors ...
    """
    modules = _FREE_MODULES + _MODULES * len(tensors)
    numbers = _FREE_NUMBERS + _NUMBERS * sum(tensor.numel() for tensor in tensors.values())
    built = {"modules": 0, "numbers": 0}

    def count_module(*_: Any) -> None:
        built["modules"] += 1
        if built["modules"] > modules:
            raise CheckpointError(
                f"{what} describes a model of more than {modules} modules, but {len(tensors)} tensors are stored"
            )

    def count_numbers(_: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None and not nn.parameter.is_lazy(parameter):
            built["numbers"] += parameter.numel()
        if built["numbers"] > numbers:
            raise CheckpointError(
                f"{what} describes a model of more than {numbers} numbers ({name}), far beyond those stored"
            )

    handles = [
        registration.register_module_module_registration_hook(count_module),
        registration.register_module_parameter_registration_hook(count_numbers),
    ]
    with hooked(handles):
        yield
