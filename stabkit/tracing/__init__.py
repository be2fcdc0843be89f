"""One forward pass of any torch model as an exact chain of differentiable steps."""

from stabkit.tracing.flow import Flow, State, Step
from stabkit.tracing.maps.iteration import Iteration, iterate
from stabkit.tracing.maps.recurrent import recurrent_flow
from stabkit.tracing.protocols import FlowLike, StateLike, StepLike, same_space
from stabkit.tracing.tracer import trace

__all__ = [
    "Flow",
    "FlowLike",
    "Iteration",
    "State",
    "StateLike",
    "Step",
    "StepLike",
    "iterate",
    "recurrent_flow",
    "same_space",
    "trace",
]
