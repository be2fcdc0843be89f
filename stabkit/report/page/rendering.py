"""Reports put into the HTML templates; styles, script and data are all inside the file, the data as small as can be."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from stabkit.diagnosis import VERDICTS, factor
from stabkit.diagnosis.kinds import headline, headline_tone, rank
from stabkit.errors import ArgumentError
from stabkit.report import tables
from stabkit.report.formats import figures, percent, signed
from stabkit.report.plane import Plane, plane_of
from stabkit.report.shown import Shown, shown_fields
from stabkit.text import printable

if TYPE_CHECKING:
    import jinja2

    from stabkit.report.schema import ReportFields

_MINUS = re.compile(r"(?<![\w.)])-(?=\d)")
_SCRIPTS = {
    "report.html": ("shared.js", "block.js", "report.js"),
    "comparison.html": ("shared.js", "comparison.js"),
    "run.html": ("run.js",),
}
if TYPE_CHECKING:
    from stabkit.diagnosis import Finding
    from stabkit.integrators import GeneralLinearMethod
    from stabkit.report.schema import ReportFields, StepReport

EIGENVALUES = 1200  # of one step, drawn; the rest lie among them
_DIGITS = 5
_CURVE = 160  # points of one line of a region
_ROUNDING = 1e-4  # how far |R(z)| may exceed 1 by rounding before an eigenvalue counts as outside


def report_page(report: ReportFields) -> str:
    """One report as a self-contained HTML page.

    Everything that comes from a model or a checkpoint is escaped; the page loads nothing and works from disk.

    Example:
        >>> import torch, stabkit
        >>> report = stabkit.analyze(torch.nn.Linear(2, 2), torch.ones(1, 2))
        >>> report_page(report).startswith("<!doctype html>")
        True
    """
    return rendered("report.html", report=report, data=report_data(report))


def comparison_page(reports: Mapping[str, ReportFields]) -> str:
    """Several reports on the same model, such as the checkpoints of a run, as one self-contained HTML page.

    Args:
        reports: reports in order, by the names they get.

    Raises:
        ArgumentError: there is no report.
    """
    if not reports:
        raise ArgumentError("reports is empty; a comparison needs at least one report")
    return rendered("comparison.html", reports=reports, data=comparison_data(reports))


def rendered(template: str, **values: Any) -> str:
    """A template of this package with its style, its scripts and these values."""
    environment = _environment()
    scripts = [_asset(name) for name in _SCRIPTS[template]]
    return environment.get_template(template).render(style=_asset("page.css"), scripts=scripts, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2  # needed for pages alone

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
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


def report_data(report: ReportFields) -> dict[str, Any]:
    """One report for the script: what is drawn of every step, and the regions that are no discs, once each."""
    planes = [plane_of(step) for step in report.steps]
    methods = list({plane.method: None for plane in planes if plane is not None and plane.method is not None})
    gradient, state = report.output_gradient_norm, report.output_state_norm
    return {
        "steps": [_step(step, plane, methods) for step, plane in zip(report.steps, planes, strict=True)],
        "regions": [_region(method) for method in methods],
        "end": {
            "gradient": _with_ends(gradient, report.output_gradient_norm_interval),
            "state": _with_ends(state, report.output_state_norm_interval),
        },
        "first": _first_choice(report),
    }


def comparison_data(reports: Mapping[str, ReportFields]) -> dict[str, Any]:
    """Several reports for the script: total growth and the growth of every step that all of them have."""
    names: list[str] = []
    for report in reports.values():
        names += [step.name for step in report.steps if step.name not in names]
    growth = [
        [_round({step.name: step.growth for step in report.steps}.get(name)) for name in names]
        for report in reports.values()
    ]
    return {
        "reports": list(reports),
        "steps": names,
        "growth": growth,
        "total": [_round(report.total_growth) for report in reports.values()],
        "interval": [[_round(end) for end in report.total_growth_interval] for report in reports.values()],
    }


def _step(step: StepReport, plane: Plane | None, methods: Sequence[GeneralLinearMethod]) -> dict[str, Any]:
    method = None if plane is None else plane.method
    z = thinned(() if plane is None else plane.z.tolist(), EIGENVALUES)
    around = step.numerical_range if method is None else None
    return {
        "index": step.index,
        "name": step.name,
        "kind": step.kind,
        "method": step.method,
        "after": list(step.after),
        "growth": _round(step.growth),
        "low": _round(step.growth_interval[0]),
        "high": _round(step.growth_interval[1]),
        "norms": {
            "gradient": _with_ends(step.gradient_norm, step.gradient_norm_interval),
            "state": _with_ends(step.state_norm, step.state_norm_interval),
        },
        "skip": _round(step.skip),
        "z": None if plane is None else _points(z),
        "grows": None if method is None else (method.amplification(np.array(z)) > 1 + _ROUNDING).tolist(),
        "region": None if method is None else methods.index(method),
        "range": None if around is None else _points(around),
        "count": len(step.z or ()),
        "partial": step.spectrum_method == "krylov",
        "stages": _stages(step),
        "attribution": None if step.attribution is None else {k: _round(v) for k, v in step.attribution.items()},
    }


def _stages(step: StepReport) -> dict[str, Any]:
    """The field of every stage, which stage enters which, and which are implicit."""
    A = (step.tableau or {}).get("A", ())
    links = [[j, i] for i, row in enumerate(A) for j, entry in enumerate(row) if entry and j < i]
    implicit = [i for i, row in enumerate(A) if any(row[i:])]
    return {"fields": list(step.stage_fields), "links": links, "implicit": implicit}


def _region(method: GeneralLinearMethod) -> list[dict[str, Any]]:
    """The boundary as lines of few points."""
    curves = []
    for curve in method.region().curves:
        every = max(1, len(curve.points) // _CURVE)
        curves.append({"points": _points(curve.points[::every]), "closed": curve.closed})
    return curves


def _points(values: Iterable[complex]) -> list[list[float | str | None]]:
    return [[_round(v.real), _round(v.imag)] for v in values]


def _with_ends(value: float | None, ends: tuple[float, float] | None) -> list[float | str | None]:
    low, high = ends or (None, None)
    return [_round(value), _round(low), _round(high)]


def thinned(values: Sequence[complex], limit: int) -> list[complex]:
    """At most ``limit`` of the values, evenly spaced in the order of their modulus, the largest always among them.

    Example:
        >>> thinned([1, 4, 2, 3, 0], 3)
        [4, 2, 0]
    """
    finite = [v for v in values if math.isfinite(abs(v))]
    if len(finite) <= limit:
        return list(finite)
    ordered = sorted(finite, key=lambda v: -abs(v))
    return [ordered[round(i * (len(ordered) - 1) / (limit - 1))] for i in range(limit)]


def _first_choice(report: ReportFields) -> int:
    """The step to show first: the one that the worst finding names, or the one that changes the gradient most."""
    for finding in sorted(report.findings, key=lambda f: -rank(f.severity)):
        place = place_of(report, finding)
        if place is not None:
            return place
    blocks = [s for s in report.steps if s.kind == "step"] or list(report.steps)
    sizes = [(abs(s.growth) if math.isfinite(s.growth) else math.inf, -s.index) for s in blocks]
    return -max(sizes)[1] if sizes else 0


def place_of(report: ReportFields, finding: Finding) -> int | None:
    """The step that a finding is about: of those that it lists, the one whose module it names, or else the first."""
    listed = [index for index in finding.steps if index < len(report.steps)]
    named = [index for index in listed if report.steps[index].module_path == finding.module_path]
    return next(iter(named or listed), None)


def _round(value: float | None) -> float | str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return float(f"{value:.{_DIGITS}g}")
