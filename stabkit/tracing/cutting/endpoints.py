"""Where a flow ends: the output that a person would mean, and what a loss reads of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.errors import StabkitError, TraceError
from stabkit.tracing.graph.values import Value, value_of
from stabkit.tracing.recording.containers import listed_at, map_tensors, named_tensors
from stabkit.tracing.recording.inputs import differentiable
from stabkit.tracing.recording.recorder import Ending
from stabkit.tracing.recording.untouched_model import aside

Target = Callable[[Any], Tensor] | str | Sequence[str] | None


class UnreachedError(TraceError):
    """Nothing differentiable leads from an input to the output in this recording; another may find more."""


def ending(target: Target) -> Ending | None:
    """What makes of a model's output the tensors that a flow ends at; None where they are outputs as they stand."""
    if callable(target):
        return functools.partial(_computed, target)
    if target is None or isinstance(target, str):
        return None
    return functools.partial(_joined, tuple(target))


def _computed(target: Callable[[Any], Tensor], output: Any) -> tuple[Any, list[tuple[str, Tensor]]]:
    with torch.enable_grad():
        chosen = target(output)
    if not isinstance(chosen, Tensor):
        raise TraceError(f"target returned {type(chosen).__name__}; expected a function of the output to a tensor")
    return output, [("target", chosen)]


def _joined(paths: Sequence[str], output: Any) -> tuple[Any, list[tuple[str, Tensor]]]:
    """Several outputs as one end: each as a view that nothing in the model is made of.

    One output may be made of another, as a decoded sample is of its mean. What a loss takes of each by itself is then
    the gradient by its view; that by the output would count what the other passes on a second time.
    """
    chosen = [_output_at(output, path) for path in paths]
    with torch.enable_grad():
        views = {id(tensor): tensor.view_as(tensor) for _, tensor in chosen if tensor.requires_grad}
    return (
        map_tensors(output, lambda tensor: views.get(id(tensor), tensor)),
        [(path, views.get(id(tensor), tensor)) for path, tensor in chosen],
    )


def _output_at(output: Any, path: str) -> tuple[str, Tensor]:
    named = named_tensors(output)
    for found in named:
        if found[0] == path:
            return found
    known = ", ".join(other or "''" for other, _ in named)
    raise TraceError(f"target={path!r} is not a tensor of the output; there are: {known}")


def find_targets(output: Any, ends: list[tuple[str, Tensor]] | None, target: Target) -> dict[Value, str]:
    """The values that the flow leads to, with their names: what was asked for, or the first that is not a loss.

    Where that is one of a list of tensors of one shape, as a network gives out that refines its output, it is the one
    that was made last.
    """
    if ends is not None:
        found = ends
    elif isinstance(target, str):
        found = [_output_at(output, target)]
    else:
        found = named_tensors(output)
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
            f"{_described(floats[0][0])} does not depend differentiably on any input: no derivative leads back from it"
        )
    reached = [(path, tensor) for path, tensor in reached if tensor.numel() > 0]
    if not reached:
        raise TraceError(f"{_described(floats[0][0])} has no elements: for this input there is nothing to analyse")
    wide = [(path, tensor) for path, tensor in reached if not (tensor.dim() == 0 and "loss" in path)]
    several = ends is not None and not callable(target)
    meant = reached if several else [_last_made(output if ends is None else None, (wide or reached)[0], reached)]
    return {value_of(tensor): path or "output" for path, tensor in meant}


def _last_made(output: Any, first: tuple[str, Tensor], reached: Sequence[tuple[str, Tensor]]) -> tuple[str, Tensor]:
    """The tensor that was made last in a list of tensors of one shape; the given one where it is in none."""
    around, _, _ = first[0].rpartition(".")
    listed = listed_at(output, around)
    alike = [found for found in reached if found[0].rpartition(".")[0] == around and found[1].grad_fn is not None]
    whole = listed is not None and len(alike) == len(listed) and len({tensor.shape for _, tensor in alike}) == 1
    return max(alike, key=lambda found: found[1].grad_fn._sequence_nr()) if whole else first  # type: ignore[union-attr]


def _described(path: str) -> str:
    return f"the output {path!r}" if path else "the model's output"


def scalar_loss(loss: Any, output: Any) -> Tensor:
    """A loss of the model's output, on the graph.

    Raises:
        TraceError: the loss is no function of the output that returns a differentiable scalar; an `UnreachedError`
            where it carries no gradient, as one that reads an output which is cut off from the input.
    """
    if not callable(loss):
        several = (
            "; for several losses there is stabkit.growth.gradient_profiles" if isinstance(loss, list | tuple) else ""
        )
        raise TraceError(
            f"loss is a {type(loss).__name__}; expected a callable on the model's output that returns a scalar, "
            f"e.g. loss=lambda out: out.square().mean(){several}"
        )
    try:
        with aside(loss), torch.enable_grad():
            scalar = loss(output)
    except StabkitError:
        raise
    except Exception as error:
        raise TraceError(_failed(error)) from error
    if not isinstance(scalar, Tensor) or scalar.numel() != 1:
        found = f"shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
        raise TraceError(f"loss returned {found}; expected a scalar, e.g. loss=lambda out: out.square().mean()")
    if scalar.is_complex():
        raise TraceError("the loss is complex; return a real scalar, such as its real part or its size")
    if not scalar.requires_grad:
        raise UnreachedError("the loss does not depend on the model's output; compute it from its argument")
    if scalar.grad_fn is None and not any(scalar is tensor for _, tensor in named_tensors(output)):
        raise UnreachedError(
            "the loss does not depend differentiably on the model's output: it was made to require a gradient "
            "(requires_grad_) after the way back had been cut, which lets backward() run and moves nothing"
        )
    if made := _leaves_of_others(scalar, [tensor for _, tensor in named_tensors(output)]):
        of = (
            "parameters of another network alone, which is given the output without its graph"
            if all(isinstance(tensor, nn.Parameter) for tensor in made)
            else "a tensor that was made inside of it (torch.tensor(..., requires_grad=True), or requires_grad_() "
            "behind a threshold, an argmax, .item() or numpy)"
        )
        raise UnreachedError(
            f"the loss does not depend differentiably on the model's output: it leads back to {of}, which lets "
            "backward() run and moves nothing of the model"
        )
    return scalar


def _leaves_of_others(scalar: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that a loss leads back to, where no output was made of any of them and it leads to no output."""
    ends = {tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None}
    above = _above([scalar.grad_fn], ends) if ends else None  # of outputs that are not found nothing is known
    if above is None or any(scalar is tensor for tensor in outputs):
        return []
    given = {id(tensor) for tensor in outputs}  # a parameter may be an output, too
    leaves = {node for node in above if hasattr(node, "variable")}
    if any(id(node.variable) in given for node in leaves):
        return []
    own = _above(list(ends), set()) or set()
    return [node.variable for node in leaves] if leaves.isdisjoint(own) else []


def _above(firsts: Sequence[Node | None], stops: set[Node]) -> set[Node] | None:
    """All nodes that lead to some; None where one of those at which to stop is among them."""
    found: set[Node] = set()
    stack = [node for node in firsts if node is not None]
    while stack:
        node = stack.pop()
        if node in stops:
            return None
        if node not in found:
            found.add(node)
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def _failed(error: Exception) -> str:
    """What a loss says that raised, and what that means where it is known."""
    message = " ".join(str(error).split())[:400]
    text = f"the loss failed on the model's output: {type(error).__name__}: {message}"
    if "is out of bounds" in message and message.startswith("Target"):
        text += (
            "; classes are counted from 0: with C outputs the labels run from 0 to C - 1. Where they begin at 1, take "
            "labels - 1; otherwise give the last layer as many outputs as there are classes"
        )
    if "elements of input should be between 0 and 1" in message:
        text += (
            "; binary_cross_entropy takes probabilities: give it the sigmoid of the output, or, better, the output as "
            "it is to binary_cross_entropy_with_logits"
        )
    return text


def outputs_read(loss: Any, output: Any) -> tuple[str, ...]:
    """Paths of the outputs whose values a loss depends on.

    Raises:
        TraceError: the loss is no function of the output that returns a differentiable scalar.
    """
    leaves: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        return leaves.setdefault(id(tensor), tensor.detach().requires_grad_(True))

    scalar = scalar_loss(loss, map_tensors(output, leaf))
    found = dict(zip(leaves, torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True), strict=True))
    return tuple(path for path, tensor in named_tensors(output) if found.get(id(tensor)) is not None)
