from __future__ import annotations

import math

import pytest

from stabkit.errors import ReportError
from stabkit.report import Report
from tests.report.synthetic import FINDING, make_report, make_step, make_training


def data():
    return make_report(make_step(0), make_step(1), findings=(FINDING,)).to_dict()


def test_a_report_comes_back_equal():
    steps = (
        make_step(0, z=None, skip=None, residual=None, spectral_radius=None, outside_share=None),
        make_step(1, growth=-math.inf, gradient_norm=0.0, growth_interval=(-math.inf, math.inf), notes=("x", "y")),
        make_step(2, kind="transition", source_shapes=((3, 4), ()), z=()),
    )
    report = make_report(*steps, findings=(FINDING,), training=make_training())
    assert Report.from_dict(report.to_dict(), "here") == report


def test_nan_comes_back():
    back = Report.from_dict(make_report(make_step(growth=math.nan), chain_error=math.nan).to_dict(), "here")
    assert math.isnan(back.steps[0].growth)
    assert math.isnan(back.chain_error)


@pytest.mark.parametrize("other", [[], 3, None, {}, {"schema": "stabkit.report/2"}, {"schema": ["odd"]}])
def test_another_schema_is_refused(other):
    with pytest.raises(ReportError, match=r"f\.json: not a report that this version reads.*'stabkit\.report/1'"):
        Report.from_dict(other, "f.json")


@pytest.mark.parametrize("key", ["verdict", "steps", "total_growth", "seconds"])
def test_a_missing_key_is_named(key):
    content = data()
    del content[key]
    with pytest.raises(ReportError, match=rf"f\.json: {key} is missing"):
        Report.from_dict(content, "f.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("growth", "much", r"f\.json: steps\[1\]: growth: expected a number, found 'much'"),
        ("z", [[1.0]], r"steps\[1\]: z: expected a list of two numbers"),
        ("index", 1.5, r"steps\[1\]: index: expected an integer"),
        ("kind", "odd", r"steps\[1\]: kind='odd'; accepted: 'step', 'transition'"),
        ("source_shapes", [3], r"steps\[1\]: source_shapes: expected a list, found 3"),
        ("spectrum_converged", 1, "expected true or false"),
        ("source_size", 10**400, None),
    ],
)
def test_a_wrong_value_is_named_with_its_place(key, value, message):
    content = data()
    content["steps"][1][key] = value
    if message is None:
        assert Report.from_dict(content, "f.json").steps[1].source_size == value
        return
    with pytest.raises(ReportError, match=message):
        Report.from_dict(content, "f.json")


def test_a_number_too_large_for_a_float_is_refused():
    content = data()
    content["steps"][0]["growth"] = 10**400
    with pytest.raises(ReportError, match=r"steps\[0\]: growth: "):
        Report.from_dict(content, "f.json")


def test_keys_of_a_later_minor_version_are_passed_over():
    content = data() | {"mood": "good"}
    assert Report.from_dict(content, "f.json").model == "Net"
