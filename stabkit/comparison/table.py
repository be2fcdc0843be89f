"""A comparison as rows: the table that people read, and CSV."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stabkit.report.formats import figures, middle, percent, printable, signed
from stabkit.tables import aligned
from stabkit.tables import csv_text as comma_separated

if TYPE_CHECKING:
    from stabkit.comparison.result import Comparison, Snapshot

_NAME = 34
TITLES = (
    *("checkpoint", "step", "verdict", "growth", "interval", "change", "most changed"),
    *("radius", "margin", "sigma", "out", "findings"),
)
_DROPPED = ("interval", "margin", "out", "sigma", "most changed", "change")  # in this order, where there is no room
LEFT = ("checkpoint", "verdict", "most changed", "findings")


def rows(comparison: Comparison) -> list[list[str]]:
    """One row a checkpoint, in the order of ``TITLES``."""
    drifts = {drift.source: drift for drift in comparison.drift}
    first = comparison.analysed[0].source if comparison.analysed else ""
    found = []
    for snapshot in comparison.snapshots:
        drift = drifts.get(snapshot.source)
        changed = "-" if drift is None or snapshot.source == first else _marked(drift.growth_change, drift.moved)
        place = "-"
        if drift is not None and drift.step_name and snapshot.source != first:
            place = f"{middle(printable(drift.step_name), 18)} {signed(drift.step_change)}"
        found.append([*_start(snapshot), changed, place, *_end(snapshot)])
    return found


def fitted(comparison: Comparison, width: int) -> list[list[str]]:
    """Titles, then one row a checkpoint, in the columns that fit into ``width`` characters."""
    table = [list(TITLES), *rows(comparison)]
    kept = list(TITLES)
    for title in _DROPPED:
        if sum(max(len(row[TITLES.index(t)]) for row in table) + 1 for t in kept) <= width:
            break
        kept.remove(title)
    return [[row[TITLES.index(title)] for title in kept] for row in table]


def _start(snapshot: Snapshot) -> list[str]:
    report = snapshot.report
    name = middle(printable(snapshot.source), _NAME)
    step = "-" if snapshot.step is None else f"{snapshot.step:g}"
    if report is None:
        return [name, step, snapshot.state, "-", "-"]
    low, high = report.total_growth_interval
    return [name, step, report.verdict, signed(report.total_growth), f"{signed(low)} to {signed(high)}"]


def _end(snapshot: Snapshot) -> list[str]:
    if snapshot.report is None:
        return ["-"] * 4 + [middle(printable(snapshot.message), 60)]
    kinds = sorted({f"{finding.kind} ({finding.severity})" for finding in snapshot.report.findings})
    return [
        _figure(snapshot.largest_radius),
        _figure(snapshot.margin),
        _figure(snapshot.largest_singular_value),
        percent(None if math.isnan(snapshot.outside_share) else snapshot.outside_share),
        ", ".join(kinds) or "none",
    ]


def _figure(value: float) -> str:
    return figures(None if math.isnan(value) else value)


def _marked(change: float, moved: bool) -> str:
    return signed(change) + ("*" if moved else "")


def legend() -> str:
    """What the columns mean."""
    return (
        "growth: of the gradient through the blocks, nats; change: against the first checkpoint, * where the intervals "
        "do not overlap; most changed: the step whose growth moved furthest from the first checkpoint's; "
        "radius, sigma, out: the largest spectral radius, singular value and share of eigenvalues outside the region "
        "of any step; "
        "margin: 1 - radius."
    )


def plain(comparison: Comparison, width: int = 160) -> str:
    """The comparison as text without colors, in lines of about ``width`` characters."""
    table = fitted(comparison, width)
    lines = aligned(table, text={place for place, title in enumerate(table[0]) if title in LEFT})
    tail = [*comparison.changes, *comparison.notes]
    return "\n".join([*lines, "", *map(printable, tail), legend()])


def csv_text(comparison: Comparison) -> str:
    """One row a checkpoint and step of the flow, for a spreadsheet or a data frame."""
    columns = ["source", "training_step", "step_name", "state", "verdict", "index", "name", "kind", "growth"]
    columns += ["growth_low", "growth_high", "spectral_radius", "largest_singular_value", "outside_share"]
    rows = []
    for snapshot in comparison.snapshots:
        start: dict[str, Any] = {
            "source": snapshot.source,
            "training_step": snapshot.step,
            "step_name": snapshot.step_name,
            "state": snapshot.state,
        }
        if snapshot.report is None:
            rows.append(start)
            continue
        start["verdict"] = snapshot.report.verdict
        same = ("index", "name", "kind", "growth", "spectral_radius", "largest_singular_value", "outside_share")
        for step in snapshot.report.steps:
            low, high = step.growth_interval
            values = {name: getattr(step, name) for name in same}
            rows.append({**start, **values, "growth_low": low, "growth_high": high})
    return comma_separated(columns, rows)
