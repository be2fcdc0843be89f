"""Gradient clipping that hands on the norms it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stabkit.monitor.parameters import norms_of


@dataclass(frozen=True)
class Clipped:
    """One call of clipping.

    Attributes:
        norms: Euclidean norms of the gradients before it, by ``id`` of their parameter; this rank's part when sharded.
        total: the norm that was clipped.
        max_norm: what it was clipped to.
    """

    norms: dict[int, Tensor]
    total: Tensor
    max_norm: float

    def coefficient(self, total: float) -> float:
        """What the gradients were multiplied by, as ``torch.nn.utils.clip_grad_norm_`` does it."""
        # a comparison with NaN is false, and torch multiplies by NaN then
        ratio = self.max_norm / (total + 1e-6)
        return 1.0 if ratio > 1.0 else ratio


def clip(
    parameters: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    *,
    recording: bool,
) -> tuple[Tensor, Clipped | None]:
    """Clip gradients in place, bit for bit as ``torch.nn.utils.clip_grad_norm_`` does.

    Where that takes the Euclidean norm of every gradient in one fused call, these norms serve the record as well;
    otherwise (other norms, half precision, sharded parameters) they are computed for it.

    Returns:
        the total norm before clipping, and what the record needs when there is one.
    """
    held = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in held if p.grad is not None]
    shared = (
        recording
        and bool(grads)
        and norm_type == 2.0
        and foreach is not False
        and len({(g.device, g.dtype) for g in grads}) == 1
        and grads[0].dtype in (torch.float32, torch.float64)
        and all(type(g) is Tensor and not g.is_sparse for g in grads)
    )
    norms = norms_of(grads, plain=shared) if recording else []
    if shared:
        total = torch.linalg.vector_norm(torch.stack(norms))
        if error_if_nonfinite and not bool(total.isfinite()):
            raise RuntimeError(
                f"the total norm of the gradients is {float(total)}, so they cannot be clipped; "
                "set error_if_nonfinite=False to clip them all the same"
            )
    else:
        total = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(parameters, max_norm, total, foreach)
    if not recording:
        return total, None
    whole = total.full_tensor() if hasattr(total, "full_tensor") else total
    return total, Clipped({id(p): n for p, n in zip(held, norms, strict=True)}, whole.detach(), float(max_norm))
