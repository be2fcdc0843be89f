"""A field of a step is declared once: table, CSV file, JSON, page and legend follow from it."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import pytest

from stabkit.errors import ReportError
from stabkit.report import Report, StepReport, tables
from stabkit.report.formats import figures
from stabkit.report.page import report_page
from stabkit.report.shown import flat, flat_names, shown, shown_fields
from tests.report.synthetic import make_report, make_step


@dataclass(frozen=True, kw_only=True)
class Longer(StepReport):
    curvature: float | None = shown(
        "Curvature of the step",
        lambda step: figures(step.curvature),
        default=None,
        aside=lambda step: "per unit of depth",
        column="curv",
        sortable=True,
        meaning="how much the step bends",
    )
    curvature_interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class LongerReport(Report):
    step_type = Longer
    steps: tuple[Longer, ...]


def longer(**changes) -> LongerReport:
    plain = make_report(make_step())
    steps = (Longer(**{**vars(make_step()), **changes}),)
    return LongerReport(**{**vars(plain), "steps": steps})


def test_a_new_field_is_one_edit():
    report = longer(curvature=0.125, curvature_interval=(0.1, 0.15))
    assert "curv" in str(report)
    assert "0.125" in str(report)
    assert "curv: how much the step bends" in " ".join(tables.legend(report))
    page = report_page(report)
    assert page.count("Curvature of the step") == 2  # beside the step, and over its column
    assert "per unit of depth" in page
    (row,) = csv.DictReader(io.StringIO(tables.csv_text(report)))
    assert (row["curvature"], row["curvature_low"], row["curvature_high"]) == ("0.125", "0.1", "0.15")
    assert LongerReport.from_dict(report.to_dict()) == report


def test_a_report_from_before_the_field_is_read():
    data = longer(curvature=0.125).to_dict()
    del data["steps"][0]["curvature"]
    assert LongerReport.from_dict(data).steps[0].curvature is None
    del data["steps"][0]["growth"]
    with pytest.raises(ReportError, match=r"steps\[0\]: growth is missing"):
        LongerReport.from_dict(data)


def test_what_was_not_measured_is_not_listed_on_the_page():
    shown_for = make_step(step_size=None, margin=None, mechanism=None)
    how = shown_fields(shown_for)
    assert not any(how[name].text(shown_for) for name in ("step_size", "margin", "mechanism"))
    assert "Margin to the boundary" not in report_page(make_report(shown_for))


def test_a_row_has_its_names_whatever_is_missing():
    full, bare = make_step(), make_step(z=None, skip=None, gradient_norm_interval=None)
    assert list(flat(full)) == list(flat(bare)) == flat_names(StepReport)
    assert flat(full)["n_eigenvalues"] == 2
    assert flat(bare)["n_eigenvalues"] is None
    assert flat(full)["source_shapes"] == "3x4"
