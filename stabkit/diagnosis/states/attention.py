"""Attention whose softmax is saturated: every query takes one key, and no gradient gets to queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.node_derivatives import signed
from stabkit.tracing.recording.attentions import FEWEST_KEYS, entropies, flat_rows
from stabkit.vocabulary import moves

_SOFTMAXES = frozenset({"Softmax", "SafeSoftmax"})
_BETWEEN = moves("reshape", "permute", "copy", "expand") | {"Mul", "NativeDropout"}


@dataclass(frozen=True)
class Attention:
    """One softmax over keys.

    Attributes:
        step: in which it runs.
        path: the module that it runs in.
        flat: share of rows that pass no gradient on to their scores; rows that see one key alone do not count.
        entropy: mean entropy of those rows over that of a uniform one.
        keys: mean number of keys that a row sees.
    """

    step: int
    path: str
    flat: float
    entropy: float
    keys: float


def attentions(flow: Flow) -> list[Attention]:
    """The softmaxes of a flow whose rows weigh something."""
    found = []
    nodes = flow.recorded.graph.nodes
    for position, node in enumerate(nodes):
        if operation(node) in _SOFTMAXES and weighs(flow, node):
            step = next((s.index for s in flow.steps if position < s.target.position), len(flow.steps) - 1)
            measured = _measured(node, step, flow.recorded.recording.path_at(node._sequence_nr()))
            if measured is not None:
                found.append(measured)
    return found


def weighs(flow: Flow, node: Node) -> bool:
    """Whether the result is a factor of a matrix product, as the weights of values are."""
    reached = {node}
    for other in flow.recorded.graph.nodes[flow.recorded.graph.rank[node] + 1 :]:
        if not any(value.node in reached for value in flow.recorded.graph.inputs[other]):
            continue
        name = operation(other)
        if name in ("Bmm", "Mm", "Matmul"):
            return True
        if name in _BETWEEN:
            reached.add(other)
    return False


def _measured(node: Node, step: int, path: str) -> Attention | None:
    weights = getattr(node, "_saved_result", None)
    if weights is None or weights.dim() < 2:
        return None
    (dim,) = signed([getattr(node, "_saved_dim", -1)])
    p = weights.detach().to(torch.float64).movedim(dim, -1)
    p = p.reshape(-1, p.shape[-1])
    if p.shape[-1] < FEWEST_KEYS:
        return None
    seen = _seen(p)
    rows = p[seen >= FEWEST_KEYS]
    if len(rows) == 0:
        return None
    entropy = entropies(rows, seen[seen >= FEWEST_KEYS])
    return Attention(step, path, float(flat_rows(rows).double().mean()), float(entropy.mean()), float(seen.mean()))


def _seen(p: torch.Tensor) -> torch.Tensor:
    """How many keys each row could see.

    A key that no row of a causal or padded pattern sees has weight zero exactly, but so has one that underflowed: a
    row counts the keys up to the last that it, or an earlier row, gives weight to.
    """
    count = p.shape[-1]
    rows = len(p) // count if len(p) % count == 0 else 0
    if rows:
        causal = p.reshape(rows, count, count).triu(1).eq(0).all()
        if bool(causal):
            return torch.arange(1, count + 1, dtype=torch.float64).repeat(rows)
    return torch.full((len(p),), float(count), dtype=torch.float64)


def attention_findings(flow: Flow, thresholds: Thresholds) -> list[Finding]:
    """Softmaxes over keys that are saturated in most rows."""
    every = attentions(flow)
    found = [each for each in every if each.flat >= thresholds.saturated]
    if not found:
        return []
    worst = max(found, key=lambda each: each.flat)
    also = f"; so do those of {len(found) - 1} more of {len(every)}" if len(found) > 1 else ""
    return [
        Finding(
            kind="saturated",
            severity="warning",
            steps=tuple(sorted({each.step for each in found})),
            module_path=worst.path,
            confidence=worst.flat,
            evidence=f"{worst.flat:.0%} of the rows of the softmax in {worst.path or 'the model'} give all their "
            f"weight to one of {worst.keys:.0f} keys (entropy {worst.entropy:.1%} of the largest){also}: no gradient "
            "gets back to queries and keys",
            remedy="make the scores smaller: divide them by sqrt(head size) if nothing does, scale the weights of q "
            "and k down, or put a norm on q and k (QK-norm)",
            reference="Zhai et al., Stabilizing Transformer training by preventing attention entropy collapse, 2023; "
            "Dehghani et al., Scaling vision transformers to 22 billion parameters, 2023",
            numbers={"flat": worst.flat, "entropy": worst.entropy, "keys": worst.keys, "layers": float(len(found))},
        )
    ]
