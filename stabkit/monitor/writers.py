"""Where records go: files, services (see `services`), or any callable."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from stabkit.diagnosis import Finding
from stabkit.errors import ArgumentError, did_you_mean
from stabkit.monitor.reading import findings_beside
from stabkit.monitor.record import ALONG, SHARPNESS, Record
from stabkit.monitor.services import MLflowWriter, TensorBoardWriter, WandbWriter
from stabkit.tables import csv_cell

_BLOCK = 1 << 16  # bytes read at once in the search for the end of the last whole line


@runtime_checkable
class Writer(Protocol):
    """What a monitor hands its records to; one with a method ``alert(finding, step)`` gets the findings as well."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish; called once."""


class JSONLinesWriter:
    """One JSON object a line, flushed after each, so that a killed run leaves whole lines.

    NaN and infinities are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, since JSON has no numbers for
    them. Findings go into a second file beside it, ``NAME.findings.jsonl``, which is there from the first on.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = _continued(self.path)

    def alert(self, finding: Finding, step: int) -> None:
        """Append a finding with its training step."""
        line = json.dumps({"training_step": step, **finding.to_dict()}, allow_nan=False)
        with _continued(findings_beside(self.path)) as file:
            file.write(line + "\n")

    def write(self, record: Record) -> None:
        """Append a line."""
        self._file.write(json_line(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CSVWriter:
    """One line for each block of each record: step, time, loss, norms, findings, curvature, and the block's numbers.

    A file that is continued keeps the columns that it has.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns = _header(self.path)
        self._file = _continued(self.path)
        self._lines = csv.writer(self._file)

    def write(self, record: Record) -> None:
        """Append the lines of a record."""
        look = dict.fromkeys(SHARPNESS, "") if record.look is None else record.look.scalars()
        totals = {
            "step": record.step,
            "time": record.time,
            "loss": record.loss,
            "total_gradient_norm": record.gradient_norm,
            "clipped_norm": record.clipped_norm,
            "skipped": record.skipped,
            "log_z": record.log_z,
            "output_logit": record.output_logit,
            "findings": " ".join(record.findings),
            **look,
            **(dict.fromkeys(ALONG, "") if record.along is None else record.along.scalars()),
        }
        for block in record.blocks:
            values = {**totals, **vars(block), "non_finite": " ".join(block.non_finite)}
            if not self._columns:
                self._columns = list(values)
                self._lines.writerow(self._columns)
            self._lines.writerow([csv_cell(values.get(column, "")) for column in self._columns])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _header(path: Path) -> list[str]:
    """The columns of a table that is there already."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), []) if file.readline().endswith("\n") and not file.seek(0) else []


def _continued(path: Path) -> TextIO:
    """A file open at its end, without a last line that a killed run has left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start and b"\n" not in tail:
            start = file.seek(max(0, start - _BLOCK))
            tail = file.read(end - start)
        file.truncate(start + tail.rfind(b"\n") + 1)
    opened = path.open("a", encoding="utf-8", newline="")
    opened.seek(0, os.SEEK_END)
    return opened


class CallableWriter:
    """Hands each record to a function."""

    def __init__(self, function: Callable[[Record], Any]) -> None:
        self._function = function

    def write(self, record: Record) -> None:
        """Call the function."""
        self._function(record)

    def close(self) -> None:
        """Nothing to close."""


#: What a user may name: the suffix of a file, or a service, which is given the directory of the monitor.
WRITERS: dict[str, Callable[[Path], Writer]] = {
    ".jsonl": JSONLinesWriter,
    ".ndjson": JSONLinesWriter,
    ".csv": CSVWriter,
    "tensorboard": lambda folder: TensorBoardWriter(folder / "tensorboard"),
    "wandb": lambda _: WandbWriter(),
    "mlflow": lambda _: MLflowWriter(),
}


def open_writers(writers: Any, directory: Path | None) -> list[Writer]:
    """Writers from what a user gives: paths by suffix, names of ``WRITERS``, writers, callables; one or several.

    Args:
        writers: what was given; None is a file of records in the directory, where there is one.
        directory: the directory of the monitor; TensorBoard writes into ``stabkit`` where there is none.

    Raises:
        ArgumentError: something that is none of these.
    """
    if writers is None:
        return [] if directory is None else [JSONLinesWriter(directory / "records.jsonl")]
    several = isinstance(writers, Iterable) and not isinstance(writers, str | Writer)
    return [_open(writer, directory or Path("stabkit")) for writer in (writers if several else [writers])]


def _open(writer: Any, directory: Path) -> Writer:
    if isinstance(writer, str | os.PathLike):
        path = Path(writer)
        if path.suffix in WRITERS:
            return WRITERS[path.suffix](path)
        if str(writer) in WRITERS:
            return WRITERS[str(writer)](directory)
        guess = did_you_mean(str(writer), WRITERS)
        raise ArgumentError(
            f"writers: {str(writer)!r} is no file that ends in one of {_names('.')}, and none of {_names('')}{guess}"
        )
    if isinstance(writer, Writer):
        return writer
    if callable(writer):
        return CallableWriter(writer)
    raise ArgumentError(
        f"writers: got {type(writer).__name__}; expected a path ({_names('.')}), one of {_names('')}, an object with "
        "write and close, or a callable"
    )


def _names(mark: str) -> str:
    """The suffixes among ``WRITERS``, which begin with a dot, or the names."""
    return ", ".join(name for name in WRITERS if name.startswith(".") == bool(mark))


def json_line(record: Record) -> str:
    """A record as one line of strict JSON."""
    return json.dumps(record.to_dict(), allow_nan=False)
