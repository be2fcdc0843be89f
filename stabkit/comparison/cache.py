"""Finished checkpoints on disk, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from stabkit.comparison.result import STATES, Snapshot
from stabkit.errors import ReportError
from stabkit.report import Report, encoding, files
from stabkit.report.decoding import decoded

SCHEMA = "stabkit.snapshot/1"


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
