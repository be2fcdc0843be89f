"""Saved programs, ``torch.export`` (.pt2) and TorchScript: recognised always, loaded only when a flag says so."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabkit.errors import CheckpointError

EXPORT, SCRIPT = "torch.export program", "TorchScript"
_FLAGS = {EXPORT: "--allow-export (allow_export=True)", SCRIPT: "--allow-torchscript (allow_torchscript=True)"}


@dataclass(frozen=True)
class Program:
    """A program that was loaded with its code.

    Attributes:
        module: runs the program.
        inputs: the positional inputs saved with it, empty when there are none.
        how: the format, in words.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    how: str


def kind_of_archive(names: Collection[str]) -> str | None:
    """``EXPORT``, ``SCRIPT``, or None for anything else.

    Args:
        names: the entries of a zip, without the folder they are in.
    """
    if any(n == "archive_format" or n.endswith("serialized_exported_program.json") for n in names):
        return EXPORT
    if "constants.pkl" in names and any(n.startswith("code/") for n in names):
        return SCRIPT
    return None


def kind_of(path: Path) -> str | None:
    """``EXPORT`` or ``SCRIPT`` when a file is such a program, else None; only the names of its entries are read."""
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                return None
        with zipfile.ZipFile(path) as archive:
            return kind_of_archive([n.partition("/")[2] or n for n in archive.namelist()])
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None  # damaged: whoever reads it says how


def refusal(path: Path, kind: str) -> CheckpointError:
    """What is said without the flag."""
    return CheckpointError(
        f"{path} is a {kind}, whose loader runs what the file says. Nothing was run. Save the state dict of its "
        f"module and give the architecture with --model, or, only if you trust its author, give {_FLAGS[kind]}"
    )


def load_program(path: Path, kind: str, *, allowed: bool) -> Program:
    """Load a program with torch's own loader.

    A program has lost its modules: depth is read from its operations alone.

    Args:
        path: the file.
        kind: what :func:`kind_of` said.
        allowed: whether the user gave the flag of this kind.

    Raises:
        CheckpointError: the flag was not given, or the file is damaged.
    """
    if not allowed:
        raise refusal(path, kind)
    flag = _FLAGS[kind].partition(" ")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation notes of torch about its own formats
            if kind == SCRIPT:
                script: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
                return Program(script, (), f"{kind}, loaded with its code ({flag})")
            program = torch.export.load(path)
            saved = program.example_inputs
            return Program(program.module(), saved[0] if saved else (), f"{kind}, loaded with its code ({flag})")
    except Exception as error:  # both loaders raise anything on a damaged file
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is a {kind} that torch cannot load: {type(error).__name__}: {reason}") from error
