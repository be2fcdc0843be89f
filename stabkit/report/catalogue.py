"""The catalogue of integrators as tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from stabkit import integrators
from stabkit.integrators.linear_stability import LinearStability
from stabkit.report.terminal import plain_text


def overview() -> Table:
    """Every method: stages, states, order, and how far its stability region reaches along the axes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for title in ("stages", "states", "order", "real", "imaginary"):
        table.add_column(title, justify="right")
    table.caption = "real: [-b, 0] is stable; imaginary: i[-b, b] is stable"
    for name in integrators.names():
        method = integrators.named(name)
        table.add_row(name, *(_attribute(method, key) for key in ("stages", "states", "order")), *_intervals(method))
    return table


def details(method: LinearStability) -> RenderableType:
    """One method: its tableau, its order, its stability."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("name", plain_text(method.name))
    for key in ("source", "order", "linear_order", "stages", "states", "is_explicit", "is_A_stable", "is_L_stable"):
        if hasattr(method, key):
            facts.add_row(key.removeprefix("is_").replace("_", " "), plain_text(_attribute(method, key)))
    real, imaginary = _intervals(method)
    facts.add_row("real interval", f"[-{real}, 0]")
    facts.add_row("imaginary interval", f"i[-{imaginary}, {imaginary}]")
    parts: list[RenderableType] = [facts]
    tableau = getattr(method, "tableau", None)
    if tableau is not None:
        parts += [_block(key, getattr(tableau, key)) for key in ("A", "U", "B", "V")]
    return Group(*parts)


def _attribute(method: LinearStability, key: str) -> str:
    value = getattr(method, key, None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _intervals(method: LinearStability) -> tuple[str, str]:
    return _length(method.real_interval()), _length(method.imaginary_interval())


def _length(value: float) -> str:
    return "inf" if math.isinf(value) else f"{float(value):.4g}"


def _block(name: str, rows: Sequence[Sequence[object]]) -> Table:
    """A matrix with its name, entries as exact fractions where they are short."""
    table = Table(box=None, show_header=False, pad_edge=False, title=name, title_justify="left")
    for row in rows:
        table.add_row(*(_entry(value) for value in row))
    return table


def _entry(value: object) -> str:
    exact = str(value)
    return exact if len(exact) <= 9 else f"{float(exact.split('/')[0]) / float(exact.split('/')[1]):.6g}"
