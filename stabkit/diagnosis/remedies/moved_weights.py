"""Weights that are all moved a little: what holds at these too is no matter of those that begin at zero.

Heads, gates and tables of positions are often started at zero on purpose. What they are made for does not show in the
output then, and will after one step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from stabkit.diagnosis.remedies.applying import stood_in, trainable

_SHARE = 0.1  # of the size of a parameter
_LEAST = 0.02  # standard deviation that GPT and BERT draw all their weights with


@contextlib.contextmanager
def moved_weights(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """A model with noise on all that is trained, for a while; its own parameters are not touched.

    Raises:
        StabkitError: some of them are not in memory.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> with moved_weights(layer):
        ...     bool((layer.weight != 0).all())
        True
        >>> bool((layer.weight == 0).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    with stood_in(model):
        with torch.no_grad():
            for weight in trainable(model).values():
                size = float(weight.abs().double().square().mean().sqrt()) if weight.numel() else 0.0
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise.to(weight), alpha=max(_SHARE * size, _LEAST))
        yield
