"""What a comparison found: one snapshot a checkpoint, how they differ, and both as rows of text and of CSV."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabkit.errors import ArgumentError, ReportError
from stabkit.pictures import drawing
from stabkit.report import Report, encoding, files
from stabkit.report.formats import figures, middle, signed
from stabkit.report.schema import StepReport, outside
from stabkit.results import Result
from stabkit.tables import aligned
from stabkit.tables import csv_text as comma_separated
from stabkit.text import printable

SCHEMA = "stabkit.comparison/1"
STATES = ("analysed", "non-finite", "failed")

_NAME = 34
TITLES = (
    *("checkpoint", "step", "verdict", "growth", "interval", "change", "most changed"),
    *("radius", "margin", "sigma", "out", "findings"),
)
_DROPPED = ("interval", "margin", "out", "sigma", "most changed", "change")  # in this order, where there is no room
LEFT = ("checkpoint", "verdict", "most changed", "findings")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Snapshot(Result):
    """One checkpoint of a comparison.

    Attributes:
        source: the checkpoint as it was named.
        state: ``"analysed"``, ``"non-finite"`` (its weights hold NaN or infinity) or ``"failed"``.
        step: how far training had come, None when neither the file nor its name says.
        step_name: what counts ``step``: an entry of the checkpoint, or a part of the file's name.
        content: hash of the checkpoint's bytes; empty for a model name, and without a cache.
        cached: whether the report comes from an earlier run.
        report: None unless it was analysed.
        message: why there is no report.
    """

    source: str
    state: str
    step: float | None = None
    step_name: str = ""
    content: str = ""
    cached: bool = False
    report: Report | None = None
    message: str = ""

    @property
    def label(self) -> str:
        """A short name: the step when it is known, else the end of the path."""
        if self.step is not None:
            return f"{self.step:g}"
        return Path(self.source).name or self.source

    @property
    def total_growth(self) -> float:
        """Gradient growth over all blocks in nats; NaN without a report."""
        return math.nan if self.report is None else self.report.total_growth

    @property
    def largest_radius(self) -> float:
        """The largest spectral radius of a step (not of a transition); NaN when none was computed."""
        return _largest(self.report, lambda step: step.spectral_radius)

    @property
    def margin(self) -> float:
        """1 minus the largest spectral radius: how far the worst eigenvalue is inside the stability region."""
        return 1.0 - self.largest_radius

    @property
    def outside_share(self) -> float:
        """The largest share of a step's spectrum outside the stability region, 0 to 1."""
        return _largest(self.report, lambda step: step.outside_share)

    @property
    def largest_singular_value(self) -> float:
        """The largest singular value of a step: the worst growth in one step."""
        return _largest(self.report, lambda step: step.largest_singular_value)

    def _contents(self) -> dict[str, Any]:
        measured = ("label", "total_growth", "largest_radius", "margin", "outside_share", "largest_singular_value")
        return {**super()._contents(), **{name: getattr(self, name) for name in measured}}


@dataclass(frozen=True)
class Drift:
    """How one checkpoint differs from the first that was analysed.

    Attributes:
        source: the checkpoint.
        growth_change: change of the total growth, nats.
        moved: whether the intervals of the two total growths are disjoint.
        radius_change: change of the largest spectral radius.
        step_change: the largest change of one step's growth, nats; NaN when the steps are not the same.
        step_name: the step it belongs to.
    """

    source: str
    growth_change: float
    moved: bool
    radius_change: float
    step_change: float
    step_name: str


@dataclass(frozen=True)
class Comparison(Result):
    """The same model at several checkpoints.

    Attributes:
        snapshots: one a checkpoint, in the order given or by training step.
        over_time: whether the order is that of training.
        notes: what the reader should know.
    """

    snapshots: tuple[Snapshot, ...]
    over_time: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return plain(self)

    @property
    def analysed(self) -> tuple[Snapshot, ...]:
        """The snapshots with a report."""
        return tuple(s for s in self.snapshots if s.report is not None)

    @property
    def step_names(self) -> tuple[str, ...]:
        """Names of the flow's steps when all checkpoints share them, else empty."""
        named = {tuple(step.name for step in s.report.steps) for s in self.analysed if s.report is not None}
        return next(iter(named)) if len(named) == 1 else ()

    @property
    def growth(self) -> Array:
        """``(checkpoints, steps)``: gradient growth in nats, NaN where there is no report; steps as ``step_names``."""
        return self._per_step(lambda step: step.growth)

    @property
    def radius(self) -> Array:
        """``(checkpoints, steps)``: spectral radius, NaN where it was not computed."""
        return self._per_step(lambda step: step.spectral_radius)

    @property
    def drift(self) -> tuple[Drift, ...]:
        """Every analysed checkpoint against the first."""
        found = self.analysed
        return tuple(_drift(found[0], other, bool(self.step_names)) for other in found)

    @property
    def changes(self) -> tuple[str, ...]:
        """Sentences on where the verdict changed or weights stopped being finite, in the order of the snapshots."""
        return tuple(_change(a, b) for a, b in zip(self.snapshots, self.snapshots[1:], strict=False) if _said(a, b))

    def _contents(self) -> dict[str, Any]:
        computed = {"step_names": self.step_names, "changes": self.changes, "drift": self.drift}
        return {"schema": SCHEMA, **super()._contents(), **computed}

    def save(self, path: str | Path) -> Path:
        """Write the comparison, whole or not at all: ``.html`` (a page), ``.json``, ``.csv`` or a picture.

        Raises:
            ReportError: the suffix is another one, or the file cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".json":
            return files.write(path, encoding.lines(self.to_dict()).encode())
        if suffix == ".html":
            return files.write(path, self._page(path).encode())
        if suffix == ".csv":
            return files.write(path, _csv_text(self).encode())
        if suffix in files.PICTURES:
            return files.write_figure(drawing("sweep.overview")(self), path)
        raise ReportError(
            f"{path}: unknown suffix {suffix!r}; accepted: .html, .json, .csv, {', '.join(files.PICTURES)}"
        )

    def _page(self, path: Path) -> str:
        from stabkit.report.page import comparison_page

        if not self.analysed:
            raise ReportError(f"{path}: none of the checkpoints could be analysed, so there is nothing to show")
        reports: dict[str, Report] = {}
        for snapshot in self.analysed:
            if snapshot.report is not None:
                known = snapshot.label in reports  # two runs may both have a step 100
                reports[snapshot.source if known else snapshot.label] = snapshot.report
        return comparison_page(reports)

    def _per_step(self, value: Callable[[StepReport], float | None]) -> Array:
        names = self.step_names
        rows = np.full((len(self.snapshots), len(names)), math.nan)
        for row, snapshot in zip(rows, self.snapshots, strict=True):
            if snapshot.report is not None and names:
                found = [value(step) for step in snapshot.report.steps]
                row[:] = [math.nan if v is None else v for v in found]
        return rows


def _largest(report: Report | None, value: Callable[[StepReport], float | None]) -> float:
    steps = () if report is None else report.steps
    found = [v for step in steps if step.kind == "step" and (v := value(step)) is not None and not math.isnan(v)]
    return max(found, default=math.nan)


def _outside(report: Report) -> str:
    """The largest share of a step's spectrum outside the region, in words."""
    shares = {step.outside_share or 0.0: step for step in report.steps if step.kind == "step" and step.z}
    return outside(shares[max(shares)]) if shares else "-"


def _drift(first: Snapshot, other: Snapshot, same_steps: bool) -> Drift:
    a, b = first.report, other.report
    if a is None or b is None:
        raise ArgumentError(f"{other.source} was not analysed")
    low, high = (
        max(a.total_growth_interval[0], b.total_growth_interval[0]),
        min(a.total_growth_interval[1], b.total_growth_interval[1]),
    )
    change, name = math.nan, ""
    if same_steps and b.steps:
        changes = [(after.growth - before.growth, after.name) for before, after in zip(a.steps, b.steps, strict=True)]
        known = [pair for pair in changes if not math.isnan(pair[0])]
        change, name = max(known, key=lambda pair: abs(pair[0]), default=(math.nan, ""))
    return Drift(
        source=other.source,
        growth_change=b.total_growth - a.total_growth,
        moved=low > high,
        radius_change=other.largest_radius - first.largest_radius,
        step_change=change,
        step_name=name,
    )


def _verdict(snapshot: Snapshot) -> str:
    return snapshot.report.verdict if snapshot.report is not None else snapshot.state


def _said(a: Snapshot, b: Snapshot) -> bool:
    return _verdict(a) != _verdict(b) and "failed" not in (a.state, b.state)


def _change(a: Snapshot, b: Snapshot) -> str:
    said = f"between {a.label} and {b.label}: {_verdict(a)} became {_verdict(b)}"
    if a.report is None or b.report is None:
        return said + (f" ({b.message})" if b.message else "")
    names = [step.name for step in a.report.steps], [step.name for step in b.report.steps]
    found = _drift(a, b, names[0] == names[1])
    said += f", total growth by {found.growth_change:+.2f} nats"
    return said + (f", most at {found.step_name} ({found.step_change:+.2f})" if found.step_name else "")


def _rows(comparison: Comparison) -> list[list[str]]:
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
    table = [list(TITLES), *_rows(comparison)]
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
        _outside(snapshot.report),
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


def _csv_text(comparison: Comparison) -> str:
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
