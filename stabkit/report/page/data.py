"""What the script of a page needs, as small as it can be: few digits, and no more eigenvalues than a picture shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabkit.report.schema import Report, StepReport

EIGENVALUES = 1200  # of one step, drawn; the rest lie among them
_DIGITS = 5


def report_data(report: Report) -> dict[str, Any]:
    """One report for the script: what is drawn of every step."""
    return {"steps": [_step(step) for step in report.steps], "first": _first_choice(report)}


def comparison_data(reports: Mapping[str, Report]) -> dict[str, Any]:
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


def _step(step: StepReport) -> dict[str, Any]:
    z = thinned(step.z or (), EIGENVALUES)
    return {
        "name": step.name,
        "kind": step.kind,
        "growth": _round(step.growth),
        "low": _round(step.growth_interval[0]),
        "high": _round(step.growth_interval[1]),
        "gradient": _round(step.gradient_norm),
        "state": _round(step.state_norm),
        "skip": _round(step.skip),
        "z": None if step.z is None else [[_round(v.real), _round(v.imag)] for v in z],
        "count": len(step.z or ()),
        "partial": step.spectrum_method == "krylov",
        "attribution": None if step.attribution is None else {k: _round(v) for k, v in step.attribution.items()},
    }


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


def _first_choice(report: Report) -> int:
    """The step to show first: the one that the worst finding names, or the one that changes the gradient most."""
    ranks = {"critical": 0, "warning": 1, "info": 2}
    for finding in sorted(report.findings, key=lambda f: ranks.get(f.severity, 3)):
        named = [s.index for s in report.steps if s.module_path == finding.module_path and s.index in finding.steps]
        if named or finding.steps:
            return (named or list(finding.steps))[0]
    blocks = [s for s in report.steps if s.kind == "step"] or list(report.steps)
    sizes = [(abs(s.growth) if math.isfinite(s.growth) else math.inf, -s.index) for s in blocks]
    return -max(sizes)[1] if sizes else 0


def _round(value: float | None) -> float | str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return float(f"{value:.{_DIGITS}g}")
