"""Where a flow begins and ends: the input that leads furthest, and the output that a person would mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.errors import TraceError
from stabkit.tracing.containers import named_tensors
from stabkit.tracing.graph import Graph
from stabkit.tracing.inputs import Source, differentiable
from stabkit.tracing.values import Value, meta_of, value_of

_MOST = 0.5  # share of the longest way from which an input passes most of the model
_CONDITIONS = 8  # times as large as an input that conditions it an input is, at least

Target = Callable[[Any], Tensor] | str | None


class UnreachedError(TraceError):
    """Nothing differentiable leads from an input to the output in this recording; another may find more."""


def find_target(output: Any, target: Target) -> tuple[str, Value]:
    """The output that the flow leads to: what was asked for, or the first float tensor that is not a loss."""
    if callable(target):
        with torch.enable_grad():
            chosen = target(output)
        found = [("target", chosen)] if isinstance(chosen, Tensor) else []
        if not found:
            raise TraceError(f"target returned {type(chosen).__name__}; expected a function of the output to a tensor")
    else:
        found = named_tensors(output)
        if target is not None:
            found = [(path, tensor) for path, tensor in found if path == target]
            if not found:
                known = ", ".join(path or "''" for path, _ in named_tensors(output))
                raise TraceError(f"target={target!r} is not a tensor of the output; there are: {known}")
    floats = [(path, tensor) for path, tensor in found if differentiable(tensor)]
    if not floats:
        kinds_found = ", ".join(str(tensor.dtype) for _, tensor in found) or type(output).__name__
        raise TraceError(
            f"the model's output has no floating-point tensor (found: {kinds_found}); "
            "give target=, a function of the output that returns one, or trace an inner module"
        )
    reached = [(path, tensor) for path, tensor in floats if tensor.requires_grad]
    if not reached:
        raise UnreachedError(
            f"{_described(floats[0][0])} does not depend differentiably on any input: it is constant, detached, "
            "computed under no_grad or by operations without a derivative"
        )
    reached = [(path, tensor) for path, tensor in reached if tensor.numel() > 0]
    if not reached:
        raise TraceError(f"{_described(floats[0][0])} has no elements: for this input there is nothing to analyse")
    wide = [(path, tensor) for path, tensor in reached if not (tensor.dim() == 0 and "loss" in path)]
    path, tensor = (wide or reached)[0]
    return path or "output", value_of(tensor)


def _described(path: str) -> str:
    return f"the output {path!r}" if path else "the model's output"


def find_source(sources: Sequence[Source], target: Value, wanted: str | None) -> tuple[Graph, Source]:
    """The source with the longest way to the target; among equals the larger, then the earlier.

    A time, a label or another input that conditions what is made of a much larger one may well have the longest way,
    by the few operations that embed it; depth is counted from the larger.
    """
    if wanted is not None:
        sources = [s for s in sources if s.name == wanted] or _unknown_source(sources, wanted)
    reached = []
    for candidate in sources:
        graph = Graph([candidate.value], [target])
        if graph.reached:
            reached.append((graph, candidate))
    if not reached and not sources:
        raise UnreachedError(
            "no input carries derivatives to the output: float inputs of sparse layout are held fixed (pass a dense "
            "tensor), and integer inputs must be looked up in a table or cast to floats"
        )
    if not reached:
        raise UnreachedError("the output does not depend differentiably on the input that was given")
    direct = [pair for pair in reached if pair[1].how == "input" or pair[1].embedded] or reached
    longest = max(len(graph.nodes) for graph, _ in direct)
    if longest == 0:
        raise TraceError("the output is the input itself: there is no step between them")
    through = [pair for pair in direct if len(pair[0].nodes) >= _MOST * longest]
    largest = max(_numel(pair) for pair in through)
    main = [pair for pair in through if _numel(pair) * _CONDITIONS >= largest]
    nearly = [pair for pair in main if len(pair[0].nodes) >= 0.9 * max(len(graph.nodes) for graph, _ in main)]
    return max(nearly, key=_numel)


def _numel(pair: tuple[Graph, Source]) -> int:
    return meta_of(pair[1].value).numel


def _unknown_source(sources: Sequence[Source], wanted: str) -> list[Source]:
    known = ", ".join(repr(s.name) for s in sources)
    raise TraceError(f"source={wanted!r} is not an input or embedding of this model; there are: {known or 'none'}")


def scalar_loss(loss: Any, output: Any) -> Tensor:
    """A loss of the model's output, on the graph.

    Raises:
        TraceError: the loss is no function of the output that returns a differentiable scalar.
    """
    if not callable(loss):
        several = (
            "; for several losses there is stabkit.growth.gradient_profiles" if isinstance(loss, list | tuple) else ""
        )
        raise TraceError(
            f"loss is a {type(loss).__name__}; expected a callable on the model's output that returns a scalar, "
            f"e.g. loss=lambda out: out.square().mean(){several}"
        )
    with torch.enable_grad():
        scalar = loss(output)
    if not isinstance(scalar, Tensor) or scalar.numel() != 1:
        found = f"shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
        raise TraceError(f"loss returned {found}; expected a scalar, e.g. loss=lambda out: out.square().mean()")
    if not scalar.requires_grad:
        raise TraceError("the loss does not depend on the model's output; compute it from its argument")
    return scalar
