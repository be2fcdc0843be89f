"""Small networks whose growth is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LinearStep(nn.Module):
    """x' = a x + A x for row vectors x."""

    def __init__(self, A: Tensor, a: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + x @ self.A.T


class Activated(nn.Module):
    """A module followed by another, as one step."""

    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


def linear_steps(*matrices: Tensor, a: float = 1.0) -> nn.Sequential:
    return nn.Sequential(*[LinearStep(A.double(), a) for A in matrices])


def gaussian(kind: str, size: int, generator: torch.Generator) -> Tensor:
    """A random matrix of unit mean squared singular value: iid, antisymmetric or symmetric."""
    W = torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
    parts = {"iid": W, "antisymmetric": (W - W.T) / math.sqrt(2), "symmetric": (W + W.T) / math.sqrt(2)}
    return parts[kind]


def gaussian_steps(kind: str, *, cosine: float, size: int = 100, depth: int = 20, h: float = 0.5) -> nn.Sequential:
    """I + h A_l with A_l = sqrt(c) A + sqrt(1 - c) A'_l: tied at c = 1, independent at c = 0."""
    generator = torch.Generator().manual_seed(0)
    common = gaussian(kind, size, generator)
    drawn = [gaussian(kind, size, generator) for _ in range(depth)]
    return linear_steps(*[h * (math.sqrt(cosine) * common + math.sqrt(1 - cosine) * A) for A in drawn])


def normal_input(batch: int, size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
