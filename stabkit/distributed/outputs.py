"""The gradient of a loss on a whole batch whose samples lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.distributed.ranks import Ranks
from stabkit.errors import TraceError
from stabkit.tracing import Flow
from stabkit.tracing.call import Call
from stabkit.tracing.containers import map_tensors, named_tensors
from stabkit.tracing.values import meta_of


def output_gradients(
    flow: Flow,
    loss: Callable[[Any], Tensor],
    ranks: Ranks,
    holders: Sequence[int],
    samples: tuple[int, int],
    call: Call,
) -> list[Tensor]:
    """The part of the loss gradient that belongs to some samples, at the last state of their flow.

    The outputs of all ranks are put together on every one of them, and the loss is differentiated there.

    Args:
        flow: the flow of the samples of this rank.
        loss: on the output for the whole batch.
        ranks: who takes part.
        holders: the ranks that hold the samples, in their order, once each.
        samples: first sample of this rank, and the one after the last.
        call: how the model is called on the whole batch.

    Raises:
        TraceError: an output does not count samples, or the loss is no differentiable scalar.
    """
    low, high = samples
    dim = call.batch_dim or 0
    here = [(path, tensor) for path, tensor in named_tensors(flow.output) if tensor.requires_grad]
    ragged = [path or "output" for path, tensor in here if tensor.dim() <= dim or tensor.shape[dim] != high - low]
    told = ranks.gather(([tensor.detach().cpu() for _, tensor in here], ragged))
    if told[ranks.rank][1] or any(bad for _, bad in told):
        raise TraceError(
            f"the outputs {', '.join(told[ranks.rank][1])} do not hold one entry per sample along dimension {dim}, so "
            "they cannot be put together from several ranks: leave them out of what the model returns"
        )
    whole = [torch.cat(pieces, dim) for pieces in zip(*(told[rank][0] for rank in holders), strict=True)]
    leaves = [piece.to(tensor.device).requires_grad_() for piece, (_, tensor) in zip(whole, here, strict=True)]
    places = {id(tensor): leaf for (_, tensor), leaf in zip(here, leaves, strict=True)}
    with torch.enable_grad():
        scalar = loss(map_tensors(flow.output, lambda tensor: places.get(id(tensor), tensor)))
    if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.requires_grad:
        raise TraceError("loss returned no differentiable scalar, e.g. loss=lambda out: out.square().mean()")
    gradients = torch.autograd.grad(scalar, leaves, allow_unused=True)
    used = [
        (tensor, gradient.narrow(dim, low, high - low))
        for (_, tensor), gradient in zip(here, gradients, strict=True)
        if gradient is not None
    ]
    if not used:
        raise TraceError("the loss does not depend on the model's output; compute it from its argument")
    values = flow.states[-1].values
    pulled = torch.autograd.grad(
        [tensor for tensor, _ in used],
        [value.edge for value in values],
        [gradient for _, gradient in used],
        retain_graph=True,
        allow_unused=True,
    )
    return [
        torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if gradient is None else gradient
        for meta, gradient in zip(map(meta_of, values), pulled, strict=True)
    ]
