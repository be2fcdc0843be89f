"""Reports put into the HTML templates; styles, script and data are all inside the file."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from stabkit.diagnosis import VERDICTS, factor
from stabkit.diagnosis.kinds import headline, headline_tone
from stabkit.errors import ArgumentError
from stabkit.report import tables
from stabkit.report.formats import figures, percent, signed
from stabkit.report.page.data import comparison_data, place_of, report_data
from stabkit.report.shown import Shown, shown_fields

if TYPE_CHECKING:
    import jinja2

    from stabkit.report.schema import ReportFields

_MINUS = re.compile(r"(?<![\w.)])-(?=\d)")
_SCRIPTS = {
    "report.html": ("shared.js", "block.js", "report.js"),
    "comparison.html": ("shared.js", "comparison.js"),
}


def report_page(report: ReportFields) -> str:
    """One report as a self-contained HTML page.

    Everything that comes from a model or a checkpoint is escaped; the page loads nothing and works from disk.

    Example:
        >>> import torch, stabkit
        >>> report = stabkit.analyze(torch.nn.Linear(2, 2), torch.ones(1, 2))
        >>> report_page(report).startswith("<!doctype html>")
        True
    """
    return _render("report.html", report=report, data=report_data(report))


def comparison_page(reports: Mapping[str, ReportFields]) -> str:
    """Several reports on the same model, such as the checkpoints of a run, as one self-contained HTML page.

    Args:
        reports: reports in order, by the names they get.

    Raises:
        ArgumentError: there is no report.
    """
    if not reports:
        raise ArgumentError("reports is empty; a comparison needs at least one report")
    return _render("comparison.html", reports=reports, data=comparison_data(reports))


def _render(template: str, **values: Any) -> str:
    environment = _environment()
    scripts = [_asset(name) for name in _SCRIPTS[template]]
    return environment.get_template(template).render(style=_asset("page.css"), scripts=scripts, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2  # needed for pages alone

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    environment.filters |= {
        "number": lambda value: typeset(figures(value)),
        "signed": lambda value: typeset(signed(value)),
        "percent": lambda value: typeset(percent(value)),
        "factor": factor,
        "typeset": typeset,
        "facts": facts,
        "sortable": sortable,
        "tone": tone,
        "headline": lambda report: headline(report.verdict, report.findings).lower(),
        "headline_tone": lambda report: headline_tone(report.verdict, report.findings),
        "place": place_of,
        "radius": _radius,
        "kinds": _kinds,
    }
    return environment


@functools.cache
def _asset(name: str) -> str:
    return files(__package__ or "stabkit.report.page").joinpath(name).read_text(encoding="utf-8")


def typeset(text: str) -> str:
    """A number of a plain text as a page sets it: with a minus sign, a dash for none, words for what is not finite.

    Example:
        >>> [typeset(text) for text in ("-0.50 (-1.00 to 2.00)", "-", "nan", "-inf", "a-b")]
        ['−0.50 (−1.00 to 2.00)', '–', 'not finite', 'no gradient', 'a-b']
    """
    words = {"-": "–", "-inf": "no gradient"} | dict.fromkeys(("nan", "inf", "+inf"), "not finite")
    return words.get(text) or _MINUS.sub("−", text)


def facts(record: Any) -> list[tuple[str, str, str]]:
    """What is told of a step, or of an optimizer's updates, as a page sets it."""
    return [(title, typeset(text), typeset(aside)) for title, text, aside in tables.facts(record)]


def sortable(report: ReportFields) -> list[tuple[str, str, Shown]]:
    """The columns of the table of all steps: field, title, and how it is shown."""
    fields = shown_fields(report.step_type).items()
    return [(name, how.title or how.column, how) for name, how in fields if how.sortable]


def tone(verdict: str) -> str:
    """What a verdict says of the network, as the style sheet knows it."""
    return VERDICTS[verdict].tone


def _radius(report: ReportFields) -> float | None:
    """The largest spectral radius of any step that keeps its space."""
    known = [step.spectral_radius for step in report.steps if step.kind == "step" and step.spectral_radius is not None]
    return max((value for value in known if not math.isnan(value)), default=None)


def _kinds(report: ReportFields) -> list[tuple[str, list[str]]]:
    """Every kind of finding once, with the modules where it was found."""
    found: dict[str, list[str]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).extend([finding.module_path] if finding.module_path else [])
    return list(found.items())
