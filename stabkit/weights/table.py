"""A report on weights as a table that people read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stabkit.report.formats import figures, middle, printable, signed
from stabkit.tables import aligned

if TYPE_CHECKING:
    from stabkit.weights.matrices import MatrixReport
    from stabkit.weights.report import WeightsReport

_SHORTEST_NAME = 16
_COLUMNS: tuple[tuple[str, Callable[[MatrixReport], str]], ...] = (
    ("kind", lambda m: m.kind),
    ("shape", lambda m: "x".join(map(str, m.shape))),
    ("scale", lambda m: figures(m.sigma_w)),
    ("sigma max", lambda m: ("" if m.converged or not m.finite else "~") + figures(m.largest_singular_value)),
    ("min", lambda m: figures(m.smallest_singular_value)),
    ("stable rank", lambda m: figures(m.stable_rank)),
    ("radius", lambda m: figures(m.spectral_radius)),
    ("growth", lambda m: "-" if m.expected_growth is None else signed(m.expected_growth)),
)


def rows(report: WeightsReport, width: int) -> list[list[str]]:
    """Titles, then one row per matrix; the names get what the other columns leave of ``width`` characters."""
    cells = [[cell(matrix) for _, cell in _COLUMNS] for matrix in report.matrices]
    titles = [title for title, _ in _COLUMNS]
    taken = sum(max(len(row[i]) for row in (titles, *cells)) + 1 for i in range(len(titles)))
    room = max(width - taken, _SHORTEST_NAME)
    named = [middle(printable(matrix.name), room) for matrix in report.matrices]
    return [["name", *titles], *([name, *row] for name, row in zip(named, cells, strict=True))]


def legend(report: WeightsReport) -> str:
    """What the columns mean."""
    return (
        "scale: root mean square of the entries times the root of the fan-in; sigma: singular values; stable rank: "
        "squared Frobenius norm over squared sigma max; radius: largest |eigenvalue| of a recurrent matrix's blocks; "
        f"growth: nats per layer expected of random weights of this scale with {report.activation}, by mean field "
        "theory. ~ marks a value that has not converged."
    )


def summary(report: WeightsReport) -> str:
    """The set of weights in a sentence or two."""
    said = f"{report.n_parameters:,} numbers in {len(report.matrices)} matrices and {report.others} other tensors."
    if report.non_finite:
        shown = ", ".join(printable(name) for name in report.non_finite[:5])
        more = f" and {len(report.non_finite) - 5} more" if len(report.non_finite) > 5 else ""
        said += f" NaN or infinity in {shown}{more}."
    known = [m for m in report.matrices if m.expected_growth is not None]
    if known:
        low = min(known, key=lambda m: m.expected_growth or 0.0)
        high = max(known, key=lambda m: m.expected_growth or 0.0)
        said += (
            f" Expected growth per layer from {signed(low.expected_growth or 0.0)} ({printable(low.name)}) to "
            f"{signed(high.expected_growth or 0.0)} ({printable(high.name)}) nats."
        )
    return said


def plain(report: WeightsReport, width: int = 110) -> str:
    """The report as text without colors, in lines of about ``width`` characters."""
    lines = aligned(rows(report, width), text=range(3))
    return "\n".join(
        [f"{printable(report.name)}: WEIGHTS ONLY", summary(report), report.label, "", *lines, "", legend(report)]
    )
