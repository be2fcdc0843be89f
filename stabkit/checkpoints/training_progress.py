"""How far training had come when a checkpoint was written: read from the file, else from its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stabkit.checkpoints.pickles import Array, Namespace, Scalar

# in the order in which they are believed
STEP_NAMES = (
    "global_step",
    "step",
    "steps",
    "iteration",
    "iter",
    "iter_num",
    "n_iter",
    "it",
    "num_updates",
    "last_epoch",
    "epoch",
)
_IN_NAME = re.compile(
    r"(?:(global_?step|step|iter(?:ation)?|it|epoch|ep|checkpoint|ckpt)s?[=_-]?)?(\d+)", re.IGNORECASE
)


def training_step(content: Any) -> tuple[str, float] | None:
    """``(name, value)`` of the entry of a training dict that counts its steps or epochs.

    Example:
        >>> training_step({"model": {}, "epoch": 3, "global_step": 1200})
        ('global_step', 1200.0)
    """
    if not isinstance(content, Mapping):
        return None
    tables = [content, *(content.get(name) for name in ("meta", "state", "trainer_state", "args"))]
    for table in tables:
        entries = table.entries if isinstance(table, Namespace) else table
        if not isinstance(entries, Mapping):
            continue
        for name in STEP_NAMES:
            number = _number(entries.get(name))
            if number is not None:
                return name, number
    return None


def step_in_name(path: Path) -> tuple[str, float] | None:
    """The count that a file's name gives, the last one with a word such as ``step`` before it, else the last number.

    Example:
        >>> step_in_name(Path("epoch=3-step=1200.ckpt")), step_in_name(Path("model_0040.pt"))
        (('step', 1200.0), ('file name', 40.0))
        >>> step_in_name(Path("last.ckpt")) is None
        True
    """
    stem = re.sub(r"\.(pt|pth|ckpt|bin|safetensors)$", "", path.name, flags=re.IGNORECASE)
    found = _IN_NAME.findall(stem)
    named = [(word.lower(), number) for word, number in found if word]
    if named:
        counted = [pair for pair in named if pair[0].startswith(("step", "global", "it"))] or named
        word, number = counted[-1]
        return word, float(number)
    return ("file name", float(found[-1][1])) if found else None


def natural_order(text: str) -> tuple[tuple[bool, int, str], ...]:
    """A sort key under which ``layer.2`` comes before ``layer.10``.

    Example:
        >>> sorted(["step10.pt", "step9.pt"], key=natural_order)
        ['step9.pt', 'step10.pt']
    """
    parts = re.split(r"(\d+)", text)
    # digits compare by length, then as text: a name may have more of them than int() takes
    numbers = (part.lstrip("0") if part.isdecimal() else part for part in parts)
    return tuple(
        (not part.isdecimal(), len(number) if part.isdecimal() else 0, number)
        for part, number in zip(parts, numbers, strict=True)
        if part
    )


def _number(value: Any) -> float | None:
    if isinstance(value, Scalar):
        value = value.number()
    elif isinstance(value, Array):
        value = value.tensor()
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else None
