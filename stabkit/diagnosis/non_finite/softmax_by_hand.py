"""Softmaxes that are written out: exp(s) / sum(exp(s)), which overflows, and whose logarithm is that of zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.autograd.graph import Node

from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.tracing import Flow
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.training_pass import nodes_above

#: operations at which such a softmax is not finite first
BEGINS = frozenset({"exp", "div", "log", "exp2"})


def stable_softmax(flow: Flow, loss: Any) -> str:
    """What computes a softmax that is written out without leaving the range of its dtype; empty where there is none."""
    if loss is not None:
        nodes = set(nodes_above(scalar_loss(loss, flow.output)))
    else:
        nodes = {node for _, t in named_tensors(flow.output) if t.requires_grad for node in nodes_above(t)}
    written = {node for node in nodes if _is_softmax(node)}
    if not written:
        return ""
    if any(operation(node) == "Log" and _comes_from(node, written) for node in nodes):
        return "the logarithm of a softmax is written out: take log_softmax of the scores in place of exp, sum and log"
    return "a softmax is written out: take torch.softmax of the scores, which subtracts the largest of them first"


def _is_softmax(node: Any) -> bool:
    """Whether a node divides an exponential by its own sum."""
    parents = [parent for parent, _ in node.next_functions]
    if operation(node) != "Div" or len(parents) < 2:
        return False
    over, under = behind_moves(parents[0]), behind_moves(parents[1])
    while under is not None and _keeps_from_zero(under):
        under = behind_moves(next((p for p, _ in under.next_functions if p is not None), None))
    if over is None or under is None or not operation(over).startswith("Exp") or operation(under) != "Sum":
        return False
    return behind_moves(under.next_functions[0][0]) is over


def _comes_from(node: Any, written: Iterable[Node]) -> bool:
    inner = behind_moves(node.next_functions[0][0])
    while inner is not None and _keeps_from_zero(inner):
        inner = behind_moves(next((p for p, _ in inner.next_functions if p is not None), None))
    return inner is not None and inner in set(written)


def _keeps_from_zero(node: Node) -> bool:
    """Whether it may be what is added, or a clamp, that keeps a number from zero."""
    return operation(node) == "Add" or operation(node).startswith("Clamp")
