"""What a model says by itself: an ordinary call and an ordinary backward pass, without the code under test."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabkit.errors import StabkitError
from stabkit.tracing import Flow

from .fingerprint import bits
from .preparation import SEED, modules, named_inputs, parameters


def plain_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An ordinary call with gradients on, on copies of the inputs, with the seed that `trace` uses."""
    args, kwargs = copy.deepcopy((args, kwargs))
    torch.manual_seed(SEED)
    return model(*args, **kwargs)


def pick(output: Any, target: Any, name: str) -> Tensor:
    """The tensor of an output that the flow leads to."""
    if callable(target):
        return target(output)
    for key in [] if name == "output" else name.split("."):
        if isinstance(output, Mapping):
            output = output[next(k for k in output if str(k) == key)]
        else:
            output = output[int(key)] if key.isdigit() else getattr(output, key)
    return output


def ordinary_gradient(
    flow: Flow, target: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cotangent: Tensor
) -> Tensor:
    """Gradient at the flow's source by one plain call and one ``backward``."""
    given = dict(named_inputs(args, kwargs))
    if flow.source_name in given:
        original = given[flow.source_name]
        leaf = original.detach().clone().requires_grad_()
        args, kwargs = copy.deepcopy((args, kwargs), {id(original): leaf.clone()})
        torch.manual_seed(SEED)
        output = model(*args, **kwargs)
    else:
        with SourceAsLeaf(flow.states[0].tensors[0]) as replaced:
            output = plain_call(model, args, kwargs)
        if replaced.leaf is None:
            raise StabkitError(f"no operation of an ordinary call makes the source {flow.source_name!r}")
        leaf = replaced.leaf
    # backward rather than autograd.grad: reentrant checkpoints know only the former
    pick(output, target, flow.target_name).backward(cotangent)
    if leaf.grad is None:
        raise StabkitError("the model's own backward does not reach the source")
    return leaf.grad


class SourceAsLeaf(TorchFunctionMode):
    """Replaces the first result that equals a tensor (the embedding of integers) by a leaf of the same values."""

    def __init__(self, wanted: Tensor) -> None:
        super().__init__()
        self.wanted = wanted
        self.leaf: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.leaf is not None or not isinstance(result, Tensor) or result.dtype != self.wanted.dtype:
            return result
        if result.shape == self.wanted.shape and torch.equal(result, self.wanted):
            self.leaf = result.detach().clone().requires_grad_()
            return self.leaf.clone()
        return result


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth|| in double precision; infinite when shapes or finite entries differ."""
    ours, truth = ours.detach(), truth.detach()
    finite = ours.isfinite()
    if ours.shape != truth.shape or not torch.equal(finite, truth.isfinite()):
        return math.inf
    wide = torch.complex128 if truth.is_complex() else torch.float64
    ours, truth = ours[finite].to(wide), truth[finite].to(wide)
    scale = float(truth.norm())
    difference = float((ours - truth).norm())
    return difference / scale if scale > 0 else difference


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter requires grad, so that ``backward`` adds to no ``.grad``."""
    trainable = [p for p in parameters(model) if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def restored(model: Any) -> Iterator[None]:
    """Undo what an ordinary call in train mode writes to buffers (running statistics, power iterations)."""
    buffers = [b for _, module in modules(model) for b in module.buffers(recurse=False)]
    tensors = [t for t in buffers if not isinstance(t, nn.parameter.UninitializedBuffer)]
    copies = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in zip(tensors, copies, strict=True):
                if bits(tensor) != bits(saved):  # a write, even of the same values, ends the life of saved tensors
                    tensor.copy_(saved)
