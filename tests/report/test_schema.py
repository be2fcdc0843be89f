from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from tests.report.synthetic import FINDING, make_report, make_step


@pytest.mark.parametrize("field", ["kind", "evidence", "spectrum_method"])
def test_a_step_takes_only_the_words_of_the_schema(field):
    with pytest.raises(ValueError, match=f"{field}='odd'; accepted: "):
        make_step(**{field: "odd"})


def test_a_report_takes_only_known_verdicts():
    with pytest.raises(ValueError, match="verdict='fine'; accepted: 'stable'"):
        make_report(verdict="fine")


def test_the_dictionary_is_json_and_names_its_schema():
    report = make_report(make_step(growth=float("inf")), findings=(FINDING,))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["schema"] == "stabkit.report/1"
    assert data["steps"][0]["growth"] == "Infinity"
    assert data["steps"][0]["z"] == [[-0.5, 0.5], [-0.5, -0.5]]
    assert data["findings"][0]["remedy"] == "scale the branches"


def test_a_report_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_report().verdict = "drift"


def test_a_report_needs_no_torch():
    code = "import sys, stabkit.report.files; assert 'torch' not in sys.modules; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
