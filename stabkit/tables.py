"""Rows and columns as text: aligned for people, separated by commas for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stabkit.text import printable


def aligned(rows: Sequence[Sequence[str]], text: Collection[int] = (), gap: int = 1) -> list[str]:
    r"""Lines of a table whose first row holds the titles, with a rule below them.

    Args:
        rows: cells, equally many in every row; the first row has the titles.
        text: places of the columns that hold words, to the left; numbers stand to the right.
        gap: spaces between two columns.

    Example:
        >>> print("\n".join(aligned([("name", "size"), ("a", "10"), ("bcd", "2")], text={0})))
        name size
        ---------
        a      10
        bcd     2
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        (" " * gap)
        .join(
            cell.ljust(width) if place in text else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Comma-separated values under their titles; an absent value is an empty cell.

    No text is left such that a spreadsheet would run it as a formula, and no control characters.

    Example:
        >>> print(csv_text(["name", "size"], [{"name": "=a", "size": 1}, {"name": "b"}]), end="")
        name,size
        '=a,1
        b,
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def csv_cell(value: Any) -> Any:
    """Numbers as Python writes them, and a text as a spreadsheet and a terminal can be given it."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, str):
        return value
    return "'" + printable(value) if value.startswith(("=", "+", "-", "@", "\t", "\r")) else printable(value)
