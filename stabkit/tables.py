"""Rows of cells as lines of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], is_text: Sequence[bool], gap: int = 1) -> list[str]:
    r"""Lines in which text stands at the left of its column and numbers at the right, with a rule below the first.

    Args:
        rows: the titles, then the cells, as many in every row.
        is_text: for every column, whether it is text.
        gap: spaces between two columns.

    Example:
        >>> print("\n".join(aligned([["name", "size"], ["a", "12"]], [True, False])))
        name size
        ---------
        a      12
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(is_text))]
    lines = []
    for row in rows:
        cells = zip(row, widths, is_text, strict=True)
        line = (" " * gap).join(cell.ljust(width) if text else cell.rjust(width) for cell, width, text in cells)
        lines.append(line.rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines
