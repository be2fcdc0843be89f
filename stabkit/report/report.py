"""The result of an analysis as plain data: it can be printed, saved, read back and compared without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabkit.errors import ReportError
from stabkit.report import decoding, files, tables
from stabkit.report.schema import SCHEMA, ReportFields

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class Report(ReportFields):
    """The result of ``stabkit.analyze``: verdict, findings and one record per step.

    What each field holds is said in `stabkit.report.schema.ReportFields`.

    Example:
        >>> report = Report(
        ...     model="MLP", verdict="stable", summary="Gradients keep their size.", findings=(), steps=(),
        ...     total_growth=0.1, total_growth_interval=(0.0, 0.2), chain_error=1e-15, n_parameters=12,
        ...     dtype="float64", device="cpu", mode="eval", loss="random cotangent", seed=0, seconds=0.01,
        ... )
        >>> report.to_dict()["schema"]
        'stabkit.report/1'
    """

    def __str__(self) -> str:
        return tables.plain(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per step, the columns of the CSV file, as a ``pandas.DataFrame`` indexed by ``index``.

        Raises:
            ReportError: pandas is not installed.
        """
        return tables.dataframe(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file, whole or not at all.

        Args:
            path: the suffix says what is written: ``.html`` (a page to look at), ``.json`` (everything), ``.csv`` (one
                row per step), ``.png``, ``.svg`` or ``.pdf`` (three plots side by side).

        Returns:
            The path that was written.

        Raises:
            ReportError: the suffix is unknown, or the file cannot be written.
        """
        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report from a ``.json`` file that ``save`` wrote.

        Raises:
            ReportError: there is no such file, or it is not a whole report of schema ``stabkit.report/1``.
        """
        return cls.from_dict(files.read_json(path), str(path))

    @classmethod
    def from_dict(cls, data: Any, origin: str = "data") -> Report:
        """A report from what `to_dict` gave, or from the data of a JSON file.

        Args:
            data: the data.
            origin: where it came from, for the messages.

        Raises:
            ReportError: it is not a whole report of schema ``stabkit.report/1``.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            found = f"schema {schema!r}" if schema else "no schema"
            raise ReportError(
                f"{origin}: not a report that this version reads: found {found}, expected {SCHEMA!r}; "
                "analyse the model again, or read it with the version of stabkit that wrote it"
            )
        read: Report = decoding.decoded(cls, data, origin)
        return read
