"""A report as people meet it in a terminal: the verdict and what to do first, then the steps.

Names and messages may come from a checkpoint. They are shown as text, never as markup, and without control
characters, so that no file can color, clear or rewrite the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stabkit.diagnosis import SEVERITIES, Finding
from stabkit.diagnosis.kinds import Tone, headline, headline_tone
from stabkit.report import tables
from stabkit.report.formats import steps_named
from stabkit.report.schema import ReportFields
from stabkit.report.training import TrainingReport
from stabkit.text import printable

_COLORS: dict[Tone, str] = {
    "good": "green",
    "grows": "red",
    "shrinks": "red",
    "broken": "red",
    "unsure": "yellow",
    "note": "cyan",
}
# one space between columns and a rule under the titles
_RULE = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n")


def plain_text(text: str, style: str = "") -> Text:
    """A user's text for rich: no markup, no control characters."""
    return Text(printable(text), style=style)


def render(report: ReportFields, width: int) -> RenderableType:
    """Everything in a report that a terminal of ``width`` columns can show."""
    return Group(answer(report.model, report.verdict, report.summary, report.findings), details(report, width))


def answer(model: str, verdict: str, summary: str, findings: Sequence[Finding]) -> RenderableType:
    """What is known before any spectrum: the verdict and the findings."""
    color = f"bold {_COLORS[headline_tone(verdict, findings)]}"
    head = Text.assemble(plain_text(model, "bold"), ": ", (headline(verdict, findings), color), "\n")
    head.append_text(plain_text(summary))
    return Group(head, *map(_finding, findings))


def details(report: ReportFields, width: int) -> RenderableType:
    """The rest: one row per step, and what to know about them."""
    parts: list[RenderableType] = [
        *(plain_text(sentence) for sentence in tables.reason(report)),
        plain_text(tables.origin(report), "dim"),
        Padding(steps(report, width), (1, 0)),
        plain_text(tables.total(report)),
    ]
    if report.training is not None:
        parts.append(Padding(_updates(report.training), (1, 0, 0, 0)))
    parts += [plain_text(f"Note: {note}", "dim") for note in notes(report)]
    parts += [plain_text(line, "dim") for line in tables.legend(report)]
    return Group(*parts)


def steps(report: ReportFields, width: int) -> Table:
    """One row per step; transitions, which are no steps of an integrator, are dim."""
    chosen = tables.columns(report, width)
    table = Table(box=_RULE, show_edge=False, padding=0, collapse_padding=True)
    for column in chosen:
        table.add_column(column.title, justify="left" if column.is_text else "right", no_wrap=True)
    accused = {index for finding in report.findings if finding.severity == "critical" for index in finding.steps}
    for step in report.steps:
        style = "dim" if step.kind == "transition" else ""
        cells = [plain_text(column.cell(step)) for column in chosen]
        if step.index in accused:
            cells[[column.title for column in chosen].index("growth")].stylize("red")
        table.add_row(*cells, style=style)
    return table


def _updates(training: TrainingReport) -> RenderableType:
    """What is told of an optimizer's updates, and what could not be had."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for title, text, aside in tables.facts(training):
        table.add_row(title, Text.assemble(plain_text(text), plain_text(f" ({aside})" if aside else "", "dim")))
    notes = [plain_text(note, "dim") for note in training.notes]
    return Group(Text("Coming updates:"), Padding(Group(table, *notes), (0, 0, 0, 2)))


def _finding(finding: Finding) -> RenderableType:
    where = " at ".join(filter(None, (steps_named(finding.steps), finding.module_path)))
    first = Text.assemble(
        (finding.severity, _COLORS[SEVERITIES[finding.severity].tone]),
        plain_text(f" {finding.kind}"),
        plain_text(f", {where}" if where else ""),
        f" (confidence {finding.confidence:.0%})",
    )
    lines: list[RenderableType] = [first]
    for label, text in (("seen", finding.evidence), ("remedy", finding.remedy), ("source", finding.reference)):
        if text:
            lines.append(Padding(plain_text(f"{label}: {text}"), (0, 0, 0, 2)))
    return Group(*lines)


def notes(report: ReportFields, at_most: int = 8) -> list[str]:
    """Notes on the whole and on the steps; one that several steps share is said once."""
    places: dict[str, list[int]] = {}
    for step in report.steps:
        for note in step.notes:
            places.setdefault(note, []).append(step.index)
    found = [*report.notes, *(f"{steps_named(tuple(where))}: {note}" for note, where in places.items())]
    left = len(found) - at_most
    return found if left <= 0 else [*found[:at_most], f"{left} more notes are in the JSON report"]


def show(report: ReportFields, console: Console) -> None:
    """Print a report on a console, in columns that fit its width."""
    console.print(render(report, console.width), highlight=False)
