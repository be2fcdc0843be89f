"""Finished checkpoints on disk, so that an interrupted sweep goes on where it stopped, and what decides a result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stabkit.comparison.result import STATES, Snapshot
from stabkit.errors import ReportError
from stabkit.report import Report, encoding, files
from stabkit.report.decoding import decoded
from stabkit.tracing.recording.dependencies import dependency_key

SCHEMA = "stabkit.snapshot/1"
_BLOCK = 2**20
_LIBRARIES = ("transformers", "timm", "torchvision", "peft", "safetensors", "numpy")


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
    entry = json.loads(encoding.lines({"schema": SCHEMA, **dataclasses.replace(snapshot, report=None).to_dict()}))
    entry["check"] = _check(key, entry, _report(folder, key) if snapshot.report is not None else b"")
    files.write(folder / f"{key}.json", encoding.lines(entry).encode())


def fetch(folder: Path, key: str, source: str) -> Snapshot | None:
    """A snapshot that an earlier run finished, or None when there is none or it is not what was kept."""
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        if not isinstance(entry, dict) or entry.get("schema") != SCHEMA or entry.get("state") not in STATES:
            return None
        report = _report(folder, key) if entry["state"] == "analysed" else b""
        if entry.pop("check", None) != _check(key, entry, report):
            return None
        found: Snapshot = decoded(Snapshot, {**entry, "source": source, "cached": True}, "cache")
        if found.state == "analysed":  # under its name of today: the file may have been moved
            loaded = dataclasses.replace(Report.load(folder / f"{key}.report.json"), model=source)
            found = dataclasses.replace(found, report=loaded)
        return found if found.step is None or math.isfinite(found.step) else dataclasses.replace(found, step=None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ReportError):
        return None  # whatever is wrong with it, the checkpoint itself is at hand


def _report(folder: Path, key: str) -> bytes:
    return (folder / f"{key}.report.json").read_bytes()


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


def recipe_hash(recipe: Mapping[str, Any], *modules: nn.Module) -> str:
    """A hash of all that decides a result but the checkpoint; empty where that cannot be known.

    It takes in the libraries that build models of what a checkpoint says. Of modules their weights do not count.
    """
    libraries = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    found = dependency_key(recipe), dependency_key(*modules, weights=False), dependency_key(libraries)
    return "" if None in found else "-".join(str(key) for key in found)


def state_of_files(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells that a file, or one below a directory, was written anew."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(file, file.stat()) for file in found if file.is_file()]
    return tuple((str(file), state.st_ino, state.st_size, state.st_mtime_ns) for file, state in states)


def _add_file(digest: Any, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)


def _check(key: str, entry: Mapping[str, Any], report: bytes) -> str:
    """What tells that an entry and its report are those that were kept."""
    told = json.dumps({name: value for name, value in entry.items() if name != "check"}, sort_keys=True)
    return hashlib.blake2b(f"{key}\0{told}\0".encode() + report, digest_size=16).hexdigest()
