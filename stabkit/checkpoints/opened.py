"""A model with its weights, as every reader of a source hands it over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Opened:
    """A module with its weights.

    Attributes:
        module: the module.
        name: what it is called.
        notes: what was done, in sentences.
        folder: the directory it came from, which may say how its inputs are prepared.
        inputs: positional inputs that were saved with it.
        kwargs: keyword inputs that were saved with it.
        loss: a callable on the output with the gradient that the loss of the run had there, where that was saved.
        as_saved: whether it is to run as it was saved, in the same mode and on the same batch.
        non_finite: names of tensors that hold NaN or infinity; None where nobody has looked yet.
        step: what counts the steps of training, and the count.
    """

    module: nn.Module
    name: str
    notes: tuple[str, ...]
    folder: Path | None = None
    inputs: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] | None = None
    as_saved: bool = False
    non_finite: tuple[str, ...] | None = None
    step: tuple[str, float] | None = None
