"""Hashes of plain values and tensors by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def content_key(*parts: Any) -> str:
    """A hash of strings, numbers, tensors, and nests of them; anything else counts by its ``repr``.

    Tensors without entries of their own (see `has_entries`) count by dtype and shape alone.

    Args:
        *parts: what is hashed.

    Example:
        >>> content_key("w", torch.ones(2)) == content_key("w", torch.ones(2))
        True
        >>> content_key("w", torch.ones(2)) == content_key("w", torch.zeros(2))
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, parts)
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # a row, a column or one number is contiguous whatever its strides are, and is no view as bytes with these
    entries: Any = held.as_strided((held.numel(),), (1,)).view(torch.uint8).numpy()
    return memoryview(entries)


def has_entries(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie in memory one by one: not if it is sparse, quantised, sharded or meta."""
    wrapped = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return tensor.layout == torch.strided and not (wrapped or tensor.is_meta or tensor.is_quantized)


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        digest.update(f"tensor {part.dtype} {tuple(part.shape)}\0".encode())
        if has_entries(part):
            digest.update(raw(part))
    elif isinstance(part, Mapping):
        digest.update(b"{")
        for name in sorted(part, key=str):
            digest.update(f"{name}\0".encode())
            _add(digest, part[name])
    elif isinstance(part, list | tuple):
        digest.update(b"[")
        for item in part:
            _add(digest, item)
        digest.update(b"]")
    elif part is None or isinstance(part, bool | int | float | str):
        digest.update(f"{type(part).__name__} {part!r}\0".encode())
    else:
        digest.update(f"{part!r}\0".encode())
