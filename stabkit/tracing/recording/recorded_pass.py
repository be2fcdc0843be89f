"""What a flow keeps of the forward pass that it was traced from; the readers of its graph work on this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.autograd.graph import Node

from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.recording.recorder import Recording


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """The operations of a forward pass, and the module calls around them.

    Attributes:
        graph: the operations between source and target.
        recording: the module calls, and what else was seen while the model ran.
        prefetch: for two positions, what brings back the saved tensors between them before their nodes are applied;
            None where nothing was forgotten.
    """

    graph: Graph
    recording: Recording
    prefetch: Callable[[int, int], Callable[[], None] | None]

    def path_of(self, node: Node) -> str:
        """Path of the innermost module that an operation ran in, ``""`` outside any."""
        return self.recording.path_at(node._sequence_nr())

    def segment(
        self,
        source: Sequence[Value],
        target: Sequence[Value],
        start: int,
        stop: int,
        parameters: Sequence[nn.Parameter],
    ) -> Segment:
        """The map from values at one position to values at another, differentiable by its own nodes."""
        hooks = self.recording.hooks
        return Segment(self.graph, source, target, start, stop, parameters, hooks, self.prefetch(start, stop))
