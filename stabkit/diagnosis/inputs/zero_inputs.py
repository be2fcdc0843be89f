"""Weights that multiply nothing but constant zeros: what a recurrence of one step makes of its recurrent weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import Finding
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above
from stabkit.vocabulary import moves

_MOVES = moves("reshape", "permute", "copy", "expand")
_PRODUCTS = frozenset({"Mm", "Addmm", "Bmm", "Baddbmm", "Mv"})


def zero_input_findings(flow: Flow, done: TrainingPass, zeros: Sequence[str]) -> list[Finding]:
    """Parameters without gradient that are multiplied with constants of zeros alone, told as a fact.

    Args:
        flow: the traced pass.
        done: its loss, on the graph.
        zeros: the parameters whose gradient is exactly zero, whatever else has moved.
    """
    assert done.loss is not None
    readers: dict[Node, list[Node]] = {}
    for node in nodes_above(done.loss):
        for parent, _ in node.next_functions:
            if parent is not None:
                readers.setdefault(parent, []).append(node)
    leaves: dict[int, Node] = {id(leaf.variable): leaf for leaf in map(_leaf, readers) if leaf is not None}
    idle = tuple(p for p in zeros if (leaf := leaves.get(id(done.parameters[p]))) and _meets_zeros(leaf, readers))
    if not idle:
        return []
    share = sum(done.parameters[p].numel() for p in idle) / max(1, sum(p.numel() for p in done.parameters.values()))
    return [
        Finding(
            kind="no_gradient",
            severity="info",
            steps=(len(flow.steps) - 1,),
            module_path=idle[0].rpartition(".")[0],
            confidence=1.0,
            evidence=f"{len(idle)} of {len(done.parameters)} parameters that are to be trained get a gradient of "
            f"exactly zero ({listed(idle)}; {share:.0%} of their numbers): all that they multiply are constants of "
            "zeros, as the state that a recurrence begins with",
            remedy="none is needed where a recurrence is meant to run for one step alone; else carry its state on from "
            "call to call, and look which axis it takes for time (batch_first)",
            reference="",
            numbers={"parameters": float(len(idle)), "share": share},
        )
    ]


def _leaf(node: Any) -> Any:
    return node if hasattr(node, "variable") else None


def _meets_zeros(leaf: Node, readers: dict[Node, list[Node]]) -> bool:
    """Whether everything that reads a leaf, but for how its entries are ordered, multiplies it with constant zeros."""
    stack, met = [leaf], False
    while stack:
        for reader in readers[stack.pop()]:
            if operation(reader) in _MOVES:
                stack.append(reader)
            elif operation(reader) in _PRODUCTS and _with_zeros(reader):
                met = True
            else:
                return False
    return met


def _with_zeros(node: Any) -> bool:
    """Whether a product has a factor that is a constant of zeros."""
    saved = [getattr(node, f"_saved_{name}", None) for name in ("self", "mat1", "mat2", "batch1", "batch2", "vec")]
    return any(isinstance(t, Tensor) and not t.requires_grad and not bool(t.detach().any()) for t in saved)
