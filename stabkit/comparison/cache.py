"""Finished checkpoints on disk, so that an interrupted sweep goes on where it stopped, and what decides a result."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabkit._version import __version__
from stabkit.comparison.result import STATES, Snapshot
from stabkit.errors import ReportError
from stabkit.report import Report, encoding, files
from stabkit.report.decoding import decoded

SCHEMA = "stabkit.snapshot/1"
_BLOCK = 2**20


def store(folder: Path, key: str, snapshot: Snapshot) -> None:
    """Write a finished snapshot. The short file is written last: where it is, the report beside it is whole.

    Raises:
        ReportError: the folder or a file in it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cache {folder}: the directory cannot be made: {error.strerror}") from error
    if snapshot.report is not None:
        snapshot.report.save(folder / f"{key}.report.json")
    entry = {"schema": SCHEMA, **dataclasses.replace(snapshot, report=None).to_dict()}
    files.write(folder / f"{key}.json", encoding.lines(entry).encode())


def fetch(folder: Path, key: str, source: str) -> Snapshot | None:
    """A snapshot that an earlier run finished, or None when there is none or it cannot be read."""
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        if not isinstance(entry, dict) or entry.get("schema") != SCHEMA or entry.get("state") not in STATES:
            return None
        found: Snapshot = decoded(Snapshot, {**entry, "source": source, "cached": True}, "cache")
        if found.state == "analysed":  # under its name of today: the file may have been moved
            report = dataclasses.replace(Report.load(folder / f"{key}.report.json"), model=source)
            found = dataclasses.replace(found, report=report)
        return found if found.step is None or math.isfinite(found.step) else dataclasses.replace(found, step=None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ReportError):
        return None  # whatever is wrong with it, the checkpoint itself is at hand


def content_hash(path: Path) -> str:
    """A hash of a file's bytes, or of the names and bytes of all files below a directory.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a").write_bytes(b"x")
        ...     len(content_hash(Path(folder))), content_hash(Path(folder)) == content_hash(Path(folder) / "a")
        (64, False)
    """
    digest = hashlib.blake2b(digest_size=32)
    if not path.is_dir():
        _add_file(digest, path)
        return digest.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if any(part.startswith(".stabkit") for part in file.relative_to(path).parts):
            continue
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        _add_file(digest, file)
    return digest.hexdigest()


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """A hash of plain values, and of the versions of stabkit and torch."""
    said = {"stabkit": __version__, "torch": torch.__version__, **recipe}
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=repr).encode(), digest_size=32).hexdigest()


def architecture_hash(module: nn.Module) -> str:
    """A hash of a module's structure, its plain settings and the source files of its classes; not of its weights."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(repr(module).encode())
    sources = set()
    for path, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str | tuple)}
        settings.pop("training", None)
        digest.update(f"{path} {sorted(settings.items(), key=lambda pair: pair[0])!r}".encode())
        kind = type(part)
        if not kind.__module__.startswith("torch."):
            sources.add(_source_file(kind))
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(getattr(tensor, 'shape', ()))} {getattr(tensor, 'dtype', '')}".encode())
    for source in sorted(sources - {None}, key=str):
        digest.update(str(source).encode())
        _add_file(digest, Path(str(source)))
    return digest.hexdigest()


def source_hash(function: Any) -> str | None:
    """A hash of a function's source and of what it closes over; None when that cannot be known."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    closed = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if not all(isinstance(v, bool | int | float | str | None) for v in closed.values()):
        return None
    return hashlib.blake2b(f"{text}{sorted(closed.items())!r}".encode(), digest_size=32).hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)


def _source_file(kind: type) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except TypeError:  # a class made in an interactive session
        return None
