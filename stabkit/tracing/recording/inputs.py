"""What a model is called with, prepared so that its outputs are functions of it on the autograd graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabkit.tracing.graph.values import Value, value_of
from stabkit.tracing.recording.containers import map_tensors, named_tensors


@dataclass
class Source:
    """A tensor from which depth can be counted: a float input, or the first floats made from integer inputs.

    Attributes:
        name: path of the input (``"0"``, ``"pixel_values"``) or of the module that embedded it.
        how: ``"input"``, or the operation that made floats from integers (``"embedding"``).
        tensor: the tensor that the model's operations consume; never a leaf, so that it may be written in place.
        value: its value on the graph.
    """

    name: str
    how: str
    tensor: Tensor
    value: Value

    @property
    def embedded(self) -> bool:
        """Whether the source was looked up in a table, rather than cast from a mask or a count."""
        return self.how in INDEXING


# operations that look floats up by integer indices
INDEXING = frozenset(
    {
        "embedding",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "index",
        "index_select",
        "gather",
    }
)
# operations whose result does not depend on the values of their arguments
VALUE_FREE = frozenset(
    {
        "empty",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_zeros",
        "new_empty",
        "new_ones",
        "new_full",
        "rand_like",
        "randn_like",
        "randint_like",
    }
)


def differentiable(tensor: Tensor) -> bool:
    """Whether a tensor has a dtype that can carry derivatives."""
    return tensor.is_floating_point() or tensor.is_complex()


def non_leaf(tensor: Tensor) -> Tensor:
    """A tensor of the same values that requires grad and may be written in place."""
    with torch.enable_grad():
        return tensor.detach().clone().requires_grad_().clone()


@dataclass
class Prepared:
    """Arguments of the recorded call: floats promoted to sources, integers marked as tainted."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[Source] = field(default_factory=list)
    integers: list[Tensor] = field(default_factory=list)


def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
    """Copy the float inputs into sources; a tensor passed twice stays one tensor."""
    prepared = Prepared((), {})
    copies: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for path, tensor in (*named_tensors(list(args)), *named_tensors(kwargs)):
        names.setdefault(id(tensor), path)

    def promote(tensor: Tensor) -> Tensor:
        name = names.get(id(tensor), "input")
        if id(tensor) in copies:
            return copies[id(tensor)]
        if differentiable(tensor) and tensor.layout == torch.strided:
            copy = non_leaf(tensor)
            prepared.sources.append(Source(name, "input", copy, value_of(copy)))
        else:
            copy = tensor.clone()  # the model may write to its input; the user's stays as it was
            if not differentiable(tensor):
                prepared.integers.append(copy)
        copies[id(tensor)] = copy
        return copy

    prepared.args = tuple(map_tensors(list(args), promote))
    prepared.kwargs = map_tensors(dict(kwargs), promote)
    return prepared
