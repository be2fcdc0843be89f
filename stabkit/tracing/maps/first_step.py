"""What a map must be like to be iterated: checked on its first step, with what to do where it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabkit.errors import TraceError
from stabkit.tracing.maps.linearization import StepFunction, Tensors, pulled


def try_first_step(function: StepFunction, state: Tensors, drive: Tensors) -> None:
    """Refuse a step that changes shapes, writes into its argument, or lets samples influence each other."""
    with torch.no_grad():
        given = tuple(tensor.clone() for tensor in state)
        after = function.apply(given, drive)
    if any(not torch.equal(a, b) for a, b in zip(given, state, strict=True)):
        raise TraceError(
            "step_fn writes into its argument; let it return a new tensor: x = x + ... instead of x += ..."
        )
    found, wanted = ([(tuple(t.shape), t.dtype) for t in tensors] for tensors in (after, state))
    if found != wanted:
        raise TraceError(
            f"step_fn leads from {_described(wanted)} to {_described(found)}; a map that is iterated keeps the shape "
            "and dtype of its state (use stabkit.trace for models that change it)"
        )
    leaves, again = function.record(state, drive, after)
    if function.space(state).batch > 1:
        _refuse_mixing(function, leaves, again)


def _described(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in tensors)


def _refuse_mixing(function: StepFunction, leaves: Tensors, after: Tensors) -> None:
    """A cotangent on one sample must give nothing on the others."""
    space = function.space(leaves)
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(space.batch, space.size, 1, generator=generator, dtype=torch.float64)
    for alone in (0, space.batch - 1):
        only = torch.zeros_like(columns)
        only[alone] = columns[alone]
        parts = space.unflatten(only.to(space.device, space.dtype))
        back = space.flatten(pulled(leaves, after, parts)).abs().amax((1, 2))
        back[alone] = 0
        if bool((back > 0).any()):
            shape = tuple(leaves[0].shape)
            raise TraceError(
                f"the samples of the batch influence each other (x0 has shape {shape}, its first dimension counts "
                "samples): for one initial state give x0 a first dimension of 1, for a map of the whole batch use "
                "batch_dim=None"
            )


def tensors_of(given: Any, name: str) -> Tensors:
    """A tensor or a tuple of tensors as a tuple; those of the state must carry derivatives."""
    tensors = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, list | tuple) else ()
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TraceError(f"{name} is a {type(given).__name__}; expected a tensor or a tuple of tensors")
    if name == "x0" and not all(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise TraceError(f"x0 has dtype {dtypes}; expected floating point: x0.double()")
    return tensors


def check_sizes(initial: Tensors, inputs: Tensors, n_steps: int, batch_dim: int | None) -> None:
    """Refuse states and inputs whose numbers of samples or steps do not fit."""
    if batch_dim == 0:
        if any(tensor.dim() == 0 for tensor in initial):
            raise TraceError("x0 is a number; expected (batch, ...): x0.reshape(1, 1)")
        sizes = {tensor.shape[0] for tensor in initial}
        if len(sizes) > 1 or 0 in sizes:
            raise TraceError(f"the tensors of x0 hold {sorted(sizes)} samples; expected the same number, at least one")
    for part in inputs:
        if part.dim() == 0 or part.shape[0] != n_steps:
            raise TraceError(f"inputs has shape {tuple(part.shape)}; expected ({n_steps} steps, batch, ...)")
        if batch_dim == 0 and (part.dim() < 2 or part.shape[1] != initial[0].shape[0]):
            raise TraceError(
                f"inputs has shape {tuple(part.shape)}; expected ({n_steps} steps, {initial[0].shape[0]} samples, ...)"
            )
