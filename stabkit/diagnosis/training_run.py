"""What the rules on losses, inputs and parameters read: a traced model, and one pass of it as training makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """

    flow: Flow
    loss: Any
    call: ForwardPass
    done: TrainingPass
