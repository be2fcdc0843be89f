"""A report as rows and columns: plain text, CSV and a data frame all follow from the fields of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stabkit import tables
from stabkit.diagnosis import factor
from stabkit.diagnosis.kinds import headline
from stabkit.errors import ReportError
from stabkit.report.formats import figures, middle, signed, steps_named
from stabkit.report.shown import flat, flat_names, shown_fields
from stabkit.text import printable

if TYPE_CHECKING:
    import pandas

    from stabkit.report.schema import ReportFields, StepReport

WIDE = 110  # characters from which there is room for everything
GAP = 1  # characters between two columns
SHORTEST_NAME = 8
SHORTEST_METHOD = (15, 22)  # of the narrow and of the wide table


@dataclass(frozen=True)
class Column:
    """One column of the table that people read."""

    title: str
    cell: Callable[[StepReport], str]
    is_text: bool = False


def columns(report: ReportFields, width: int) -> list[Column]:
    """The columns that fit into ``width`` characters with one space between them.

    The wide table adds the evidence behind the method and the gradient norm. Names and methods share what the others
    leave: both are whole where there is room; else methods are cut first, and names when these are at their shortest.
    """
    wide = width >= WIDE
    found: dict[str, Column] = {}
    for name, how in shown_fields(report.step_type).items():
        if how.column and (wide or not how.wide):
            found[name] = Column(how.column, how.cell or how.text, how.is_text)
    needed = {name: max(len(c.title), *map(len, map(c.cell, report.steps)), 0) for name, c in found.items()}
    free = width - sum(size + GAP for name, size in needed.items() if name not in ("name", "method")) - GAP
    least = SHORTEST_METHOD[wide]
    method = max(min(needed["method"], least), free - needed["name"])
    found["method"] = _cut(found["method"], method, without_asides)
    found["name"] = _cut(found["name"], max(free - min(method, needed["method"]), SHORTEST_NAME), middle)
    return list(found.values())


def _cut(column: Column, width: int, shorter: Callable[[str, int], str]) -> Column:
    return Column(column.title, lambda step: shorter(column.cell(step), width), column.is_text)


def without_asides(text: str, width: int) -> str:
    """A text of at most ``width`` characters: what stands in brackets goes first, then its middle.

    Example:
        >>> without_asides("projected forward Euler (ReLU)", 24)
        'projected forward Euler…'
        >>> without_asides("forward Euler", 13)
        'forward Euler'
    """
    if len(text) <= width:
        return text
    plain = text.partition(" (")[0] + "…"
    return plain if len(plain) <= min(width, len(text)) else middle(text, width)


def legend(report: ReportFields) -> list[str]:
    """What the columns mean, in a line or two."""
    meanings = [f"{how.column}: {how.meaning}" for how in shown_fields(report.step_type).values() if how.meaning]
    lines = [f"{'; '.join(meanings)}."]
    if any(step.spectral_radius is not None and not step.spectrum_converged for step in report.steps):
        lines.append("~ marks a spectrum that has not converged.")
    return lines


def total(report: ReportFields) -> str:
    """The growth over all steps with its interval, as a sentence."""
    low, high = report.total_growth_interval
    if not report.steps:
        return "No growth over depth was measured."
    return (
        f"Gradient growth through the blocks, from last to first: {signed(report.total_growth)} nats "
        f"(interval {signed(low)} to {signed(high)}), a factor of {factor(report.total_growth)}."
    )


def reason(report: ReportFields) -> list[str]:
    """Why the growth is what it is, in a sentence; none where it was not attributed."""
    return [str(report.explained["why"])] if report.explained.get("why") else []


def training(report: ReportFields) -> list[str]:
    """What is told of an optimizer's updates, a line each; none where there was no optimizer."""
    if report.training is None:
        return []
    told = facts(report.training)
    width = max(len(title) for title, _, _ in told)
    lines = [f"  {title:{width}}  {text}{f' ({aside})' if aside else ''}" for title, text, aside in told]
    return ["Coming updates:", *lines, *(f"  {note}" for note in report.training.notes)]


def facts(record: Any) -> list[tuple[str, str, str]]:
    """What is told of one record: title, value and small print of every field that has something to show."""
    told = ((how.title, how.text(record), how.aside(record)) for how in shown_fields(record).values() if how.title)
    return [fact for fact in told if fact[1]]


def origin(report: ReportFields) -> str:
    """How the numbers were obtained, in a line."""
    return (
        f"{report.n_parameters:,} parameters, {report.dtype} on {report.device}, {report.mode} mode, "
        f"loss: {report.loss}, seed {report.seed}"
        + (f", chain error {figures(report.chain_error)}" if report.steps else "")
    )


def plain(report: ReportFields, width: int = 100) -> str:
    """The report as text without colors.

    Args:
        report: the report.
        width: characters per line that the columns are chosen for.
    """
    chosen = columns(report, width)
    rows = [[column.title for column in chosen]]
    rows += [[column.cell(step) for column in chosen] for step in report.steps]
    words = {place for place, column in enumerate(chosen) if column.is_text}
    table = tables.aligned(rows, words, GAP)
    head = [
        f"{report.model}: {headline(report.verdict, report.findings)}",
        report.summary,
        *reason(report),
        origin(report),
        "",
    ]
    updates = training(report)
    tail = [
        "",
        total(report),
        *([*updates, ""] if updates else []),
        *(line for finding in report.findings for line in finding_lines(finding)),
        *report.notes,
    ]
    return printable("\n".join([*head, *table, *tail]))


def finding_lines(finding: Any) -> list[str]:
    """A finding: how bad, what, where and what was seen, and what to do in a line of its own."""
    where = finding.module_path or steps_named(finding.steps)
    place = f" at {where}" if where else ""
    remedy = [f"    Remedy: {finding.remedy}"] if finding.remedy else []
    return [f"[{finding.severity}] {finding.kind}{place}: {finding.evidence}", *remedy]


def csv_text(report: ReportFields) -> str:
    """The steps as comma-separated values, one row a step; an absent value is an empty cell."""
    return tables.csv_text(flat_names(report.step_type), map(flat, report.steps))


def dataframe(report: ReportFields) -> pandas.DataFrame:
    """One row per step; see ``Report.to_dataframe``."""
    try:
        import pandas
    except ImportError:
        raise ReportError("to_dataframe needs pandas: pip install pandas, or use report.save('steps.csv')") from None
    rows = [flat(step) for step in report.steps]
    return pandas.DataFrame.from_records(rows, columns=flat_names(report.step_type), index="index")
