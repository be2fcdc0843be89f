"""Records read back from what a monitor wrote."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from stabkit.errors import ReportError
from stabkit.monitor.record import ALONG, SHARPNESS

_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv",)
_RECORDS = "records.jsonl"
_TOTALS = ("step", "time", "loss", "clipped_norm")


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like what a monitor wrote: a directory with records, or a file of them.

    Example:
        >>> is_run("runs/first/records.jsonl"), is_run("report.json")
        (True, False)
    """
    path = Path(path)
    return path.suffix in (*_LINES, *_TABLES) or (path / _RECORDS).is_file()


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run as mappings, in the order in which they were written.

    A last line that was cut short, because the run was killed while it was written, is left out.

    Args:
        path: the directory of a monitor, its ``records.jsonl``, or the file of a `CSVWriter`. Numbers of a CSV file are
            strings, and it knows nothing of probes.

    Raises:
        ReportError: it cannot be read, or holds no records.
    """
    path = Path(path)
    path = path / _RECORDS if path.is_dir() else path
    try:
        found = _rows(path) if path.suffix in _TABLES else _lines(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: no readable records of a monitor ({type(error).__name__}: {error})") from error
    if not found:
        raise ReportError(f"{path}: holds no record yet")
    return found


def read_findings(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The findings of a run as mappings, each with its ``training_step``, the oldest first; none where none was raised.

    Args:
        path: the directory of a monitor, or its ``records.jsonl``.

    Raises:
        ReportError: they cannot be read, or there are no records that they would belong to.
    """
    given = Path(path)
    records = given / _RECORDS if given.is_dir() else given
    path = findings_beside(records)
    if not path.is_file():
        if records.is_file():
            return []
        raise ReportError(
            f"{given}: no records of a monitor; give the directory of a run (directory= of the monitor) or the file "
            "of its records"
        )
    try:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.split("\n") if line]
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: no readable findings of a monitor ({type(error).__name__}: {error})") from error


def findings_beside(path: Path) -> Path:
    """The file of the findings that belong to a file of records.

    Example:
        >>> str(findings_beside(Path("run/records.jsonl")))
        'run/records.findings.jsonl'
    """
    return path.with_suffix(".findings.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    whole, cut, _ = path.read_text(encoding="utf-8").rpartition("\n")
    found = [json.loads(line) for line in (whole if cut else "").split("\n") if line]
    for number, record in enumerate(found, 1):
        if not isinstance(record, dict) or not {"step", "findings", "blocks"} <= record.keys():
            raise ValueError(f"line {number} is no record")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values():
                break  # cut short
            totals = {name: row.pop(name) for name in _TOTALS}
            totals["gradient_norm"] = row.pop("total_gradient_norm")
            totals["skipped"] = row.pop("skipped", "0")
            findings = row.pop("findings").split()
            sharpness, ratio, rate, stable = (row.pop(name, "") for name in SHARPNESS)
            numbers = {"sharpness": sharpness, "ratio": ratio, "learning_rate": rate, "largest_stable_lr": stable}
            look = {"step": totals["step"], **numbers} if ratio else None
            curvature, along = (row.pop(name, "") for name in ALONG)
            second = {"curvature": curvature, "ratio": along} if along else None
            key = (totals["step"], totals["time"])
            parts = {"findings": findings, "probes": {}, "sharpness": look, "curvature_along_update": second}
            parts["blocks"] = []
            record = found.setdefault(key, {**totals, **parts})
            record["blocks"].append({**row, "non_finite": row["non_finite"].split()})
    return list(found.values())
