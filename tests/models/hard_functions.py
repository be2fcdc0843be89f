"""Hard cases: derivatives that autograd does not know, or that are not those of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import hard_autograd as autograd
from .building import THREE_BLOCKS, built, on
from .hard_autograd import Between
from .hard_models import Stack
from .zoo import Subject


class _QuantisedMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def _quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Between(_QuantisedMiddle()), {"middle.layer"}, dtype=torch.qint8)


class _InferenceStack(Stack):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def between(make: Callable[[], nn.Module]) -> Any:
    """A builder of a net whose middle module is the odd one."""
    return built(lambda: Between(make()), on(2, 4))


SUBJECTS = [
    Subject("straight-through Function", between(autograd.BinaryLayer), 2, "Residual", fast=True),
    Subject("straight-through detach", between(autograd.DetachedRounding), 2, "Residual", fast=True),
    Subject("gate under no_grad", between(autograd.NoGradGate), 2, "Residual", fast=True),
    Subject("@torch.no_grad forward", built(_InferenceStack, on(2, 4)), **THREE_BLOCKS, independent=False, fast=True),
    Subject(
        "numpy forward and backward", between(lambda: autograd.Calls(autograd.NumpySine)), 2, "Residual", fast=True
    ),
    Subject("once_differentiable", between(lambda: autograd.Calls(autograd.OnceSquare)), 2, "Residual", fast=True),
    Subject("reversible blocks that recompute", built(autograd.RecomputedReversible, on(2, 4)), fast=True),
    Subject("gradient reversal", between(lambda: autograd.Calls(autograd.GradientReversal)), 2, "Residual"),
    Subject("Function with several outputs", between(autograd.SeveralOutputs), 2, "Residual"),
    Subject("Function that writes in place", between(lambda: autograd.Calls(autograd.InPlaceFunction)), 2, "Residual"),
    Subject("tensor subclass parameters", between(autograd.SubclassLayer), 2, "Residual"),
    Subject("dynamic quantisation", built(_quantised, on(2, 4)), 2, "Residual", dtype=None, fast=True),
]
