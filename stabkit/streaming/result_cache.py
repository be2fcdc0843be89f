"""Tensors under keys that name what they were computed from, on disk or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from stabkit.errors import ReportError
from stabkit.hashing import content_key
from stabkit.report import files


class Store:
    """Results by key; a file appears whole or not at all, so that a killed run leaves nothing half-written.

    Args:
        folder: where the files are; None keeps everything in memory.

    Attributes:
        found: how many results were there already.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found = 0
        self._memory: dict[str, dict[str, Tensor]] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ReportError(f"out {folder}: the directory cannot be made: {error.strerror}") from error

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under a key, None when there are none, or none that can be read."""
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, ValueError, safetensors.SafetensorError):
            return None  # whatever is wrong with it, it can be computed again

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key."""
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        if self.folder is None:
            self._memory[key] = kept
        else:
            files.write(self.folder / f"{key}.safetensors", safetensors.torch.save(kept))


def key_of(kind: str, index: int, *parts: Any) -> str:
    """A key for what is computed at one place from some parts: strings, numbers, tensors, and nests of them.

    Example:
        >>> import torch
        >>> key_of("state", 3, "weights", torch.ones(2)) == key_of("state", 3, "weights", torch.ones(2))
        True
        >>> key_of("state", 3, "weights", torch.ones(2)) == key_of("state", 3, "weights", torch.zeros(2))
        False
    """
    digest = content_key(*parts, other=lambda part: type(part).__qualname__, size=12)
    return f"{kind}-{index:04d}-{digest}"
