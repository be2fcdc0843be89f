"""Finished checkpoints on disk, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from stabkit.comparison.result import STATES, Snapshot
from stabkit.errors import ReportError
from stabkit.report import Report, encoding, files
from stabkit.results import encode

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
    entry = {
        "schema": SCHEMA,
        "state": snapshot.state,
        "step": snapshot.step,
        "step_name": snapshot.step_name,
        "content": snapshot.content,
        "message": snapshot.message,
    }
    files.write(folder / f"{key}.json", encoding.lines(encode(entry)).encode())


def fetch(folder: Path, key: str, source: str) -> Snapshot | None:
    """A snapshot that an earlier run finished, or None when there is none or it cannot be read."""
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        if not isinstance(entry, dict) or entry.get("schema") != SCHEMA or entry.get("state") not in STATES:
            return None
        step = None if entry["step"] is None else encoding.number(entry["step"])
        report = None
        if entry["state"] == "analysed":  # under its name of today: the file may have been moved
            report = dataclasses.replace(Report.load(folder / f"{key}.report.json"), model=source)
        return Snapshot(
            source=source,
            state=entry["state"],
            step=step if step is None or math.isfinite(step) else None,
            step_name=encoding.typed(str, entry["step_name"]),
            content=encoding.typed(str, entry["content"]),
            cached=True,
            report=report,
            message=encoding.typed(str, entry["message"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ReportError):
        return None  # whatever is wrong with it, the checkpoint itself is at hand
