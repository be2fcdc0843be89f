"""A report as rows and columns: plain text, CSV and a data frame all show the same cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stabkit.diagnosis import factor
from stabkit.errors import ReportError
from stabkit.report.schema import Report, StepReport

if TYPE_CHECKING:
    import pandas

WIDE = 110  # characters from which there is room for everything
GAP = 1  # characters between two columns
SHORTEST_NAME = 8


@dataclass(frozen=True)
class Column:
    """One column of the table that people read."""

    title: str
    cell: Callable[[StepReport], str]
    is_text: bool = False


def figures(value: float | None, digits: int = 3) -> str:
    """A number in few characters: ``-`` when it was not computed.

    Example:
        >>> figures(1.23456), figures(0.00001234), figures(None), figures(float("nan"))
        ('1.23', '1.2e-05', '-', 'nan')
    """
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.1e}"


def signed(value: float) -> str:
    """A growth in nats with its sign.

    Example:
        >>> signed(0.5), signed(-39.02), signed(float("inf"))
        ('+0.50', '-39.02', '+inf')
    """
    if math.isnan(value):
        return "nan"
    return f"{value:+.2f}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:+.1e}"


def percent(value: float | None) -> str:
    """A share from 0 to 1 in percent; a small share that is not zero does not read as zero.

    Example:
        >>> percent(0.25), percent(0.0001), percent(0.9999), percent(None)
        ('25%', '<1%', '>99%', '-')
    """
    if value is None or not math.isfinite(value):
        return figures(value)
    if 0 < value < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= value < 1 else f"{100 * value:.0f}%"


def middle(text: str, width: int) -> str:
    """A long name cut in its middle, where dotted paths differ least.

    Example:
        >>> middle("encoder.layers.encoder_layer_11", 16)
        'encoder…layer_11'
    """
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def printable(text: str) -> str:
    r"""A text without control characters, which are shown as escapes; line ends stay.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    kept = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "".join(kept)


def sizes(step: StepReport) -> str:
    """Numbers per sample before and after a step, once when they are equal."""
    if step.source_size == step.target_size:
        return str(step.source_size)
    return f"{step.source_size}>{step.target_size}"


def columns(report: Report, width: int) -> list[Column]:
    """The columns that fit into ``width`` characters with one space between them.

    The wide table adds the evidence behind the method and the gradient norm. The names get what the others leave.
    """
    wide = width >= WIDE
    method = 22 if wide else 15
    others = [
        Column("#", lambda step: str(step.index)),
        Column("kind", lambda step: "trans" if step.kind == "transition" else step.kind, is_text=True),
        Column("size", sizes),
        Column("method", lambda step: middle(printable(step.method), method), is_text=True),
        Column("radius", _radius),
        Column("sigma", lambda step: figures(step.largest_singular_value)),
        Column("out", lambda step: percent(step.outside_share)),
        Column("growth", lambda step: signed(step.growth)),
    ]
    if wide:
        others.insert(4, Column("evidence", lambda step: step.evidence, is_text=True))
        others.append(Column("gradient", lambda step: figures(step.gradient_norm)))
    taken = sum(max(len(c.title), *(len(c.cell(step)) for step in report.steps), 0) + GAP for c in others)
    left = max(width - taken, SHORTEST_NAME)
    return [others[0], Column("name", lambda step: middle(printable(step.name), left), is_text=True), *others[1:]]


def _radius(step: StepReport) -> str:
    doubtful = step.spectral_radius is not None and not step.spectrum_converged
    return ("~" if doubtful else "") + figures(step.spectral_radius)


def legend(report: Report) -> list[str]:
    """What the columns mean, in a line or two."""
    lines = [
        "radius: largest |eigenvalue| of the step's Jacobian; sigma: its largest singular value; "
        "out: share of the eigenvalues outside the stability region; "
        "growth: log of the gradient norm before the step over that after it, in nats."
    ]
    if any(step.spectral_radius is not None and not step.spectrum_converged for step in report.steps):
        lines.append("~ marks a spectrum that has not converged.")
    return lines


def total(report: Report) -> str:
    """The growth over all steps with its interval, as a sentence."""
    low, high = report.total_growth_interval
    return (
        f"Gradient growth through the blocks, from last to first: {signed(report.total_growth)} nats "
        f"(interval {signed(low)} to {signed(high)}), a factor of {factor(report.total_growth)}."
    )


def reason(report: Report) -> list[str]:
    """Why the growth is what it is, in a sentence; none where it was not attributed."""
    return [str(report.explained["why"])] if report.explained.get("why") else []


def origin(report: Report) -> str:
    """How the numbers were obtained, in a line."""
    return (
        f"{report.n_parameters:,} parameters, {report.dtype} on {report.device}, {report.mode} mode, "
        f"loss: {report.loss}, seed {report.seed}, chain error {figures(report.chain_error)}"
    )


def plain(report: Report, width: int = 100) -> str:
    """The report as text without colors.

    Args:
        report: the report.
        width: characters per line that the columns are chosen for.
    """
    chosen = columns(report, width)
    rows = [[column.title for column in chosen]]
    rows += [[column.cell(step) for column in chosen] for step in report.steps]
    widths = [max(len(row[i]) for row in rows) for i in range(len(chosen))]
    table = [
        (" " * GAP)
        .join(
            cell.ljust(size) if column.is_text else cell.rjust(size)
            for cell, size, column in zip(row, widths, chosen, strict=True)
        )
        .rstrip()
        for row in rows
    ]
    table.insert(1, "-" * max(len(line) for line in table))
    head = [f"{report.model}: {report.verdict.upper()}", report.summary, *reason(report), origin(report), ""]
    tail = ["", total(report), *(finding_line(finding) for finding in report.findings), *report.notes]
    return printable("\n".join([*head, *table, *tail]))


def finding_line(finding: Any) -> str:
    """A finding in one line: how bad, what, where, what was seen, what to do."""
    where = finding.module_path or steps_named(finding.steps)
    place = f" at {where}" if where else ""
    remedy = f" Remedy: {finding.remedy}" if finding.remedy else ""
    return f"[{finding.severity}] {finding.kind}{place}: {finding.evidence}{remedy}"


def steps_named(steps: tuple[int, ...]) -> str:
    """Step indices in few words.

    Example:
        >>> steps_named((3,)), steps_named((0, 1, 2, 3, 7))
        ('step 3', 'steps 0-3, 7')
    """
    if not steps:
        return ""
    ordered = sorted(set(steps))
    runs: list[list[int]] = []
    for index in ordered:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"step{'s' if len(ordered) > 1 else ''} {named}"


def records(report: Report) -> list[dict[str, Any]]:
    """One row per step with every number but the eigenvalues, whose count stands in their place."""
    return [_record(step) for step in report.steps]


def _record(step: StepReport) -> dict[str, Any]:
    return {
        "index": step.index,
        "name": step.name,
        "module_path": step.module_path,
        "kind": step.kind,
        "source_shapes": _shapes(step.source_shapes),
        "target_shapes": _shapes(step.target_shapes),
        "source_size": step.source_size,
        "target_size": step.target_size,
        "method": step.method,
        "skip": step.skip,
        "evidence": step.evidence,
        "residual": step.residual,
        "n_eigenvalues": None if step.z is None else len(step.z),
        "spectral_radius": step.spectral_radius,
        "largest_singular_value": step.largest_singular_value,
        "outside_share": step.outside_share,
        "spectrum_method": step.spectrum_method,
        "spectrum_converged": step.spectrum_converged,
        "growth": step.growth,
        "growth_low": step.growth_interval[0],
        "growth_high": step.growth_interval[1],
        "gradient_norm": step.gradient_norm,
        "state_norm": step.state_norm,
        "notes": "; ".join(step.notes),
    }


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)


def csv_text(report: Report) -> str:
    """The steps as comma-separated values; an absent value is an empty cell."""
    columns_ = [*_record(_EXAMPLE)]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns_, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in row.items()} for row in records(report))
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    """Numbers as Python writes them, and no text that a spreadsheet would run as a formula."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


def dataframe(report: Report) -> pandas.DataFrame:
    """One row per step; see ``Report.to_dataframe``."""
    try:
        import pandas
    except ImportError:
        raise ReportError("to_dataframe needs pandas: pip install pandas, or use report.save('steps.csv')") from None
    return pandas.DataFrame.from_records(records(report), columns=[*_record(_EXAMPLE)], index="index")


_EXAMPLE = StepReport(
    index=0,
    name="",
    module_path="",
    kind="step",
    source_shapes=(),
    target_shapes=(),
    source_size=0,
    target_size=0,
    growth=0.0,
    growth_interval=(0.0, 0.0),
    gradient_norm=0.0,
    state_norm=0.0,
)
