"""The skip of a step: the sum of all paths from its source to its target that only move, scale and add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.audit import OPAQUE
from stabkit.tracing.nodes import apply_node, is_python_node
from stabkit.tracing.segments import Segment
from stabkit.tracing.values import Value, meta_of, operation

# operations that only move entries about
_MOVES = frozenset(
    {
        "Alias",
        "AsStrided",
        "Cat",
        "Clone",
        "ConstantPadNd",
        "Copy",
        "CopySlices",
        "Expand",
        "Flip",
        "Permute",
        "PixelShuffle",
        "Reshape",
        "ReshapeAlias",
        "Roll",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "Squeeze",
        "Stack",
        "T",
        "ToCopy",
        "Transpose",
        "Unbind",
        "UnsafeSplit",
        "UnsafeView",
        "Unsqueeze",
        "View",
    }
)
_SCALES = frozenset({"Mul", "Div", "Neg", "NativeDropout", "MaskedFill"})  # diagonal when one factor depends on x
_NORMS = frozenset({"NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "FusedRmsNorm"})
_ADDS = frozenset({"Add", "Sub", "Rsub", "Lerp"})
_POST_LIMIT = 64


@dataclass(frozen=True)
class Skip:
    """What of the source reaches the target without passing a branch.

    Attributes:
        kind: ``"identity"``, ``"scaled"`` (one number for all coordinates), ``"diagonal"`` (a number for each),
            ``"other"`` (moved or mixed coordinates), ``"normed"`` (it passes norms, as in a post-norm transformer) or
            ``"none"``.
        coefficient: the number ``a`` of x' = a x + f(x); the mean for a diagonal skip, 0 for none.
        residual: relative deviation of the skip from ``a`` times the identity, on random cotangents.
        merges: how many additions lie on the skip; 2 in a transformer block, one after each of its branches.
        after: operations between the last addition and the target, such as the ReLU of a ResNet v1.
        opaque: names of operations whose inside is not on the graph.
    """

    kind: str
    coefficient: float
    residual: float
    merges: int
    after: tuple[str, ...]
    opaque: tuple[str, ...]


def read_skip(segment: Segment) -> Skip:
    """Find the skip of a segment between two single-tensor states, and measure what it does to random cotangents."""
    source, target = segment.source[0], segment.target[0]
    inside = set(segment.nodes)
    opaque = tuple(sorted({operation(n) for n in segment.nodes if is_python_node(n) or operation(n) in OPAQUE}))
    linear = {node for node in segment.nodes if _is_linear(node, segment)}
    after: list[str] = []
    merged = target
    for _ in range(_POST_LIMIT):
        path = _paths(segment, linear, source, merged)
        merges = [n for n in path if operation(n) in _ADDS and len(set(segment.graph.inputs[n])) > 1]
        if merges or (path and merged == target):
            kind, coefficient, residual = _measure(segment, path, source, merged)
            return Skip(kind, coefficient, residual, len(merges), tuple(reversed(after)), opaque)
        node = merged.node
        inputs = list(dict.fromkeys(segment.graph.inputs[node])) if node in inside else []
        if len(inputs) != 1 or inputs[0] == source:
            break
        after.append(operation(node))
        merged = inputs[0]
    norms, merges_passed = _through_norms(segment, source, target)
    if norms and merges_passed:
        return Skip("normed", float("nan"), float("nan"), merges_passed, norms, opaque)
    return Skip("none", 0.0, 0.0, 0, (), opaque)


def _through_norms(segment: Segment, source: Value, target: Value) -> tuple[tuple[str, ...], int]:
    """The norms and the additions on a way back to the source that passes nothing else but moves and scalings."""
    inside = set(segment.nodes)
    seen: set[Value] = set()
    stack: list[tuple[Value, tuple[str, ...], int]] = [(target, (), 0)]
    while stack:
        value, norms, merges = stack.pop()
        if value == source:
            return norms, merges
        if value in seen or value.node not in inside:
            continue
        seen.add(value)
        name, inputs = operation(value.node), list(dict.fromkeys(segment.graph.inputs[value.node]))
        if name in _NORMS:
            norms = (name, *norms)
        elif not _is_linear(value.node, segment):
            continue
        merges += name in _ADDS and len(inputs) > 1
        stack.extend((v, norms, merges) for v in inputs)
    return (), 0


def _is_linear(node: Node, segment: Segment) -> bool:
    name = operation(node)
    if is_python_node(node):
        return False
    return name in _MOVES or name in _ADDS or (name in _SCALES and len(set(segment.graph.inputs[node])) == 1)


def _paths(segment: Segment, linear: set[Node], source: Value, target: Value) -> set[Node]:
    """The linear nodes on paths from source to target that consist of linear nodes alone."""
    forward: set[Node] = set()
    for node in segment.nodes:
        if node in linear and any(v == source or v.node in forward for v in segment.graph.inputs[node]):
            forward.add(node)
    found: set[Node] = set()
    stack = [target.node] if target.node in forward else []
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(v.node for v in segment.graph.inputs[node] if v.node in forward)
    return found


def _measure(segment: Segment, path: set[Node], source: Value, target: Value) -> tuple[str, float, float]:
    """Compare the skip's action on two random cotangents with a multiple of the identity."""
    before, after = meta_of(source), meta_of(target)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(after.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    cotangents = [w.to(dtype=after.dtype, device=after.device) for w in drawn]
    pulled = [_pull(segment, path, source, target, w) for w in cotangents]
    if before.numel != after.numel:
        return "other", float("nan"), float("nan")
    w = torch.stack([c.reshape(-1) for c in cotangents]).double().cpu()
    s = torch.stack([p.reshape(-1) for p in pulled]).double().cpu()
    coefficient = float((w * s).sum() / (w * w).sum())
    residual = float((s - coefficient * w).norm() / w.norm())
    tolerance = 50 * torch.finfo(after.dtype).eps
    if residual <= tolerance:
        exact = round(coefficient)
        near = abs(coefficient - exact) <= tolerance
        return ("identity" if near and exact == 1 else "scaled"), float(exact) if near else coefficient, residual
    ratios = s / w
    alike = bool(torch.allclose(ratios[0], ratios[1], rtol=1e-3, atol=1e-4))
    return ("diagonal" if alike else "other"), float(ratios.mean()) if alike else coefficient, residual


def _pull(segment: Segment, path: set[Node], source: Value, target: Value, cotangent: Tensor) -> Tensor:
    grads = {target: cotangent}
    with torch.no_grad():
        for node in reversed(segment.nodes):
            if node not in path:
                continue
            outputs: Sequence[Value] = [Value(node, i) for i in range(len(node._input_metadata))]
            given = [grads.pop(value, None) for value in outputs]
            if all(g is None for g in given):
                continue
            active = [v for v in segment.graph.inputs[node] if v == source or v.node in path]
            for value, grad in apply_node(node, given, active):
                grads[value] = grads[value] + grad if value in grads else grad
    meta = meta_of(source)
    return grads.get(source, torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device))
