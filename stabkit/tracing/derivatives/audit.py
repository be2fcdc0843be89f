"""Where the derivative that autograd gives is not, or may not be, the derivative of what the model computes."""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import Node

from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.node_derivatives import is_python_node
from stabkit.tracing.recording.recorder import Recording

# fused or compiled operations: one node that hides what it does
OPAQUE = frozenset(
    {
        "CompiledFunction",
        "CheckpointFunction",
        "MkldnnRnnLayer",
        "CudnnRnn",
        "MiopenRnn",
        "DifferentiableGraph",
    }
)
# torch's own marker of full backward hooks
_HARMLESS = {"BackwardHookFunctionBackward"}
_FLAT = frozenset({"Round", "Sign", "Floor", "Ceil", "Trunc", "Sgn", "Heaviside"})


def audit(nodes: Sequence[Node], recording: Recording, start_clock: int, stop_clock: int) -> tuple[str, ...]:
    """Notes on one stretch of a recording: what is opaque, hand-written, flat or detached there."""
    names = {operation(node) for node in nodes}
    notes = []
    custom = sorted({type(node).__name__ for node in nodes if is_python_node(node)} - _HARMLESS)
    if custom:
        notes.append(f"hand-written backward {', '.join(custom)}: its Jacobian is what that backward says")
    opaque = sorted(names & OPAQUE)
    if opaque:
        notes.append(f"opaque operation {', '.join(opaque)}: no states inside, no second derivative")
    if any("NotImplemented" in node.name() for node in nodes):
        notes.append("an operation without a derivative (quantised or custom kernel): its Jacobian counts as zero")
    flat = sorted(names & _FLAT)
    if flat:
        notes.append(f"piecewise constant operation {', '.join(flat)}: its derivative is zero")
    if any(value.node in set(nodes) for value in recording.hooks):
        notes.append("a tensor hook changes the gradient: the Jacobian is what the hook makes of it")
    stopped = [s for s in recording.stopped if start_clock <= s.time < stop_clock]
    lost = sorted({f"{s.operation} in {s.path or 'the model'}" for s in stopped})
    if lost:
        notes.append(f"values that depend on the input enter without gradient: {', '.join(lost)}")
    return tuple(notes)
