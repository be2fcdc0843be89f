"""Tensors under keys that name what they were computed from, on disk or in memory."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from stabkit.errors import ReportError
from stabkit.hashing import content_key
from stabkit.report import files
from stabkit.tracing.recording.dependencies import dependency_key

_CHECK = "stabkit"  # the entry of a file's metadata with the hash of its key and its tensors


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
        """The tensors under a key, None when there are none, or none that are what was kept there."""
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.safetensors"
        try:
            content = path.read_bytes()
            found = safetensors.torch.load(content)
            told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][_CHECK]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
            return None  # whatever is wrong with it, it can be computed again
        return found if told == content_key(key, found) else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key."""
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        if self.folder is None:
            self._memory[key] = kept
        else:
            told = {_CHECK: content_key(key, kept)}
            files.write(self.folder / f"{key}.safetensors", safetensors.torch.save(kept, told))


def key_of(kind: str, index: int, *parts: Any) -> str:
    """A key for what is computed at one place from some parts; one that is never met again where a part has none.

    Args:
        kind: what is kept.
        index: where.
        *parts: all that it depends on.

    Example:
        >>> import torch
        >>> key_of("state", 3, "weights", torch.ones(2)) == key_of("state", 3, "weights", torch.ones(2))
        True
        >>> key_of("state", 3, "weights", torch.ones(2)) == key_of("state", 3, "weights", torch.zeros(2))
        False
    """
    return f"{kind}-{index:04d}-{dependency_key(*parts, size=12) or uuid.uuid4().hex[:24]}"
