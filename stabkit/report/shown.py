"""How people see a field of a record: what it is called, and its value in few characters.

A field of a dataclass says so itself, by `shown`. The table of a terminal, the page, the CSV file and the data frame
follow from the fields; so does the reading of JSON, from their types alone (`stabkit.report.decoding`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

Text = Callable[[Any], str]


def _nothing(record: Any) -> str:
    return ""


@dataclass(frozen=True)
class Shown:
    """How a field is shown.

    Attributes:
        title: what it is called on the page; empty when the page does not list it.
        text: its value, from the whole record; empty when there is nothing to show.
        aside: what is said of the value in small print.
        column: the title of its column in a table, terse; empty when it has none.
        cell: its value in a column; ``text`` when None.
        sortable: whether the page's table of all records has it.
        is_text: whether its column is text, to the left, or numbers, to the right.
        wide: whether its column appears only where there is room.
        meaning: what the column means, for the legend; empty when its title says enough.
        counted: the name under which a row of plain values counts its entries, instead of listing them.
    """

    title: str = ""
    text: Text = _nothing
    aside: Text = _nothing
    column: str = ""
    cell: Text | None = None
    sortable: bool = False
    is_text: bool = False
    wide: bool = False
    meaning: str = ""
    counted: str = ""


def shown(title: str = "", text: Text = _nothing, *, default: Any = dataclasses.MISSING, **how: Any) -> Any:
    """A field of a dataclass that people see.

    Args:
        title: what it is called on the page.
        text: its value in few characters, from the whole record.
        default: the default of the field; without it the field must be given.
        **how: the other attributes of `Shown`.
    """
    return dataclasses.field(default=default, metadata={"shown": Shown(title, text, **how)})


def shown_fields(record: Any) -> dict[str, Shown]:
    """The fields of a record, or of its class, that people see, in their order."""
    return {field.name: field.metadata["shown"] for field in dataclasses.fields(record) if "shown" in field.metadata}


def flat_names(cls: Any) -> list[str]:
    """The names of the values in a row that `flat` makes, in their order."""
    return [name for names, _ in _plan(cls).values() for name in names]


def flat(record: Any) -> dict[str, Any]:
    """A record as one row of numbers and words.

    An interval becomes its two ends; shapes and lists of words become a text each; what has parts by name is left out.
    """
    row: dict[str, Any] = {}
    for field, (names, values) in _plan(record.__class__).items():
        value = getattr(record, field)
        row.update(zip(names, (None,) * len(names) if value is None else values(value), strict=True))
    return row


@functools.cache
def _plan(cls: Any) -> dict[str, tuple[list[str], Callable[[Any], tuple[Any, ...]]]]:
    """For each field that has a place in a row: the names there, and what its value becomes."""
    hints = get_type_hints(cls)
    found: dict[str, tuple[list[str], Callable[[Any], tuple[Any, ...]]]] = {}
    for name in (field.name for field in dataclasses.fields(cls)):
        counted = shown_fields(cls).get(name, Shown()).counted
        kind = next((k for k in _FLAT if hints[name] in (k, k | None)), None)
        if counted:
            found[name] = [counted], lambda values: (len(values),)
        elif kind == tuple[float, float]:
            stem = name.removesuffix("_interval")
            found[name] = [f"{stem}_low", f"{stem}_high"], tuple
        elif kind is not None:
            found[name] = [name], _FLAT[kind]
    return found


def _one(value: Any) -> tuple[Any, ...]:
    return (value,)


# types that have a place in a row of plain values
_FLAT: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
    **dict.fromkeys((int, float, str, bool), _one),
    tuple[float, float]: tuple,
    tuple[str, ...]: lambda words: ("; ".join(words),),
    tuple[tuple[int, ...], ...]: lambda shapes: (" ".join("x".join(map(str, shape)) or "scalar" for shape in shapes),),
}
