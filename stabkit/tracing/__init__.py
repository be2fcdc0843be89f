"""One forward pass of any torch model as an exact chain of differentiable steps."""

from stabkit.tracing.flow import Flow, State, Step
from stabkit.tracing.tracer import trace

__all__ = ["Flow", "State", "Step", "trace"]
