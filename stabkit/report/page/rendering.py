"""Reports put into the HTML templates; styles, script and data are all inside the file."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from stabkit.diagnosis import factor
from stabkit.errors import ArgumentError
from stabkit.report.page.data import comparison_data, place_of, report_data

if TYPE_CHECKING:
    import jinja2

    from stabkit.report.schema import Report

_SCRIPTS = {
    "report.html": ("shared.js", "block.js", "report.js"),
    "comparison.html": ("shared.js", "comparison.js"),
}


def report_page(report: Report) -> str:
    """One report as a self-contained HTML page.

    Everything that comes from a model or a checkpoint is escaped; the page loads nothing and works from disk.

    Example:
        >>> import torch, stabkit
        >>> report = stabkit.analyze(torch.nn.Linear(2, 2), torch.ones(1, 2))
        >>> report_page(report).startswith("<!doctype html>")
        True
    """
    return _render("report.html", report=report, data=report_data(report))


def comparison_page(reports: Mapping[str, Report]) -> str:
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
        "number": number,
        "signed": signed,
        "factor": factor,
        "shapes": _shapes,
        "percent": _percent,
        "ends": ends,
        "place": place_of,
        "radius": _radius,
        "kinds": _kinds,
        "room": room,
    }
    return environment


@functools.cache
def _asset(name: str) -> str:
    return files(__package__ or "stabkit.report.page").joinpath(name).read_text(encoding="utf-8")


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading; a dash when it was not measured.

    Example:
        >>> number(0.123456), number(None), number(float("nan")), number(-2e-9)
        ('0.123', '–', 'not finite', '−2e-09')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}g}".replace("-", "−", 1) if value < 0 else f"{value:.{digits}g}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number of nats with its sign.

    Example:
        >>> signed(1.234), signed(-0.5), signed(float("-inf"))
        ('+1.23', '−0.50', 'no gradient')
    """
    if value is None:
        return "–"
    if value == -math.inf:
        return "no gradient"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:+.{digits}f}".replace("-", "−")


def ends(interval: tuple[float, float] | None) -> str:
    """An interval for reading, empty where there is none.

    Example:
        >>> ends((0.5, 1.25)), ends(None), ends((2.0, 2.0))
        ('(0.5 to 1.25)', '', '')
    """
    if interval is None or interval[0] == interval[1] or not all(map(math.isfinite, interval)):
        return ""
    return f"({number(interval[0])} to {number(interval[1])})"


def room(factor: float) -> str:
    """How far the branch of a step may grow before its spectrum leaves the region.

    Example:
        >>> room(1.7), room(0.25), room(0.0)
        ('the branch may grow by ×1.7', 'the branch would have to shrink to ×0.25', 'undamped modes always leave it')
    """
    if factor == 0:
        return "undamped modes always leave it"
    if math.isinf(factor):
        return "the branch may grow without bound"
    return f"the branch {'may grow by' if factor >= 1 else 'would have to shrink to'} ×{number(factor)}"


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("×".join(map(str, shape)) or "scalar" for shape in shapes)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _radius(report: Report) -> float | None:
    """The largest spectral radius of any step that keeps its space."""
    known = [step.spectral_radius for step in report.steps if step.kind == "step" and step.spectral_radius is not None]
    return max((value for value in known if not math.isnan(value)), default=None)


def _kinds(report: Report) -> list[tuple[str, list[str]]]:
    """Every kind of finding once, with the modules where it was found."""
    found: dict[str, list[str]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).extend([finding.module_path] if finding.module_path else [])
    return list(found.items())
