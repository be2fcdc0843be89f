"""What the rules on losses, inputs and parameters read: a traced model, and one pass of it as training makes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from stabkit.tracing import Flow
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass


@dataclass(frozen=True)
class TrainingRun:
    """A traced model as training runs it.

    Attributes:
        flow: the traced pass.
        loss: a callable on the output that returns a scalar.
        call: the pass as training makes it.
        done: one such pass, with the loss on the graph and the gradients of the parameters.
        optimizer: that trains it, where it is known.
    """

    flow: Flow
    loss: Any
    call: ForwardPass
    done: TrainingPass
    optimizer: torch.optim.Optimizer | None = None

    def share(self, paths: Iterable[str]) -> float:
        """How much of all numbers that are to be trained some parameters hold."""
        sizes = {path: parameter.numel() for path, parameter in self.done.parameters.items()}
        return sum(sizes[path] for path in paths) / max(1, sum(sizes.values()))
