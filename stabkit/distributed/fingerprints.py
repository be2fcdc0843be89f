"""Whether two ranks were called with the same model and the same input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stabkit.tracing.containers import named_tensors
from stabkit.tracing.safekeeping import modules_behind

_ENTRIES = 64  # of every parameter, evenly spread, that are compared


def fingerprint(model: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A hash of a call: the input, names and shapes of the parameters, and some entries of each that is whole here.

    Example:
        >>> one, two = (torch.nn.Linear(2, 2) for _ in range(2))
        >>> fingerprint(one, (torch.ones(1, 2),), {}) == fingerprint(one, (torch.ones(1, 2),), {})
        True
        >>> fingerprint(one, (torch.ones(1, 2),), {}) == fingerprint(two, (torch.ones(1, 2),), {})
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, tensor in named_tensors([inputs, dict(kwargs)]):
        _add(digest, path, tensor, every=1)
    for name, parameter in modules_behind(model).named_parameters():
        _add(digest, name, parameter, every=max(1, parameter.numel() // _ENTRIES))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor, every: int) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if plain and not (tensor.is_meta or tensor.is_quantized):
        entries = tensor.detach().reshape(-1)[::every].cpu().contiguous()
        digest.update(entries.view(torch.uint8).numpy().tobytes())
