"""The Gauss-Newton part of the curvature along a direction: v^T J^T H_out J v, J the Jacobian of the output.

What is left of v^T H v comes from the curvature of the network itself (N. Schraudolph, Neural Computation 14 (2002)
1723). With a loss that is convex in the output the part is never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.curvature.hessian import Gradient, Hessian
from stabkit.curvature.setting_aside import without_hooks
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.recording.containers import map_tensors, named_tensors


def gauss_newton(hessian: Hessian, v: Tensor) -> float:
    """v^T G v for a direction ``(n,)`` in the parameters; what the loss takes of parameters directly is left out."""
    vectors = hessian.split(v)
    total = 0.0

    def add(weight: float, found: Gradient) -> None:
        nonlocal total
        total += weight * (_through(found, vectors) if len(found.cotangents) == 1 else _of_batch(found, vectors))

    hessian.each_gradient(add)
    return hessian.sum_of(total)


def _through(found: Gradient, vectors: list[Tensor]) -> float:
    """Where the loss reads one tensor of the output: both factors from the graph that is there.

    The gradient in the parameters is J^T u, u that in the output, so that its product with v has the derivative J v in
    u; and u has the derivative H_out in the output.
    """
    ((output, u),) = found.cotangents
    if u.grad_fn is None:
        return 0.0  # a loss that is linear in the output
    (pushed,) = found.pulled(vectors, [u])
    if pushed is None:
        return 0.0
    with without_hooks([output]):
        (turned,) = torch.autograd.grad(u, output, pushed, retain_graph=True, allow_unused=True)
    return 0.0 if turned is None else float((turned * pushed).sum(dtype=torch.float64))


def _of_batch(found: Gradient, vectors: list[Tensor]) -> float:
    outputs = list({id(t): t for _, t in named_tensors(found.output) if t.requires_grad}.values())
    pushed = _pushed(found, outputs, vectors)
    leaves = {id(t): t.detach().requires_grad_() for t in outputs}
    with torch.enable_grad():
        scalar = scalar_loss(found.batch.loss, map_tensors(found.output, lambda t: leaves.get(id(t), t)))
        own = list(leaves.values())
        grads = torch.autograd.grad(scalar, own, create_graph=True, allow_unused=True)
    there = [(g, u) for g, u in zip(grads, pushed, strict=True) if g is not None and g.grad_fn and u is not None]
    if not there:
        return 0.0  # a loss that is linear in the output
    gs, us = zip(*there, strict=True)
    turned = torch.autograd.grad(gs, own, us, allow_unused=True)
    parts = zip(turned, pushed, strict=True)
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in parts if a is not None and b is not None))


def _pushed(found: Gradient, outputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor | None]:
    """J v, as the derivative of J^T u, which is linear, in u."""
    seeds = [torch.zeros_like(t).requires_grad_() for t in outputs]
    with torch.enable_grad(), without_hooks(found.parameters):
        pulled = torch.autograd.grad(
            outputs, found.parameters, seeds, retain_graph=True, create_graph=True, allow_unused=True
        )
    there = [(p, v) for p, v in zip(pulled, vectors, strict=True) if p is not None and p.grad_fn]
    if not there:
        return [None] * len(outputs)
    ps, vs = zip(*there, strict=True)
    return list(torch.autograd.grad(ps, seeds, vs, retain_graph=True, allow_unused=True))
