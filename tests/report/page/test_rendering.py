from __future__ import annotations

import re

import numpy as np
import pytest

from stabkit.report.page import comparison_page, report_page
from stabkit.report.page.rendering import EIGENVALUES, comparison_data, report_data
from tests.report.synthetic import FINDING, make_chain, make_report, make_step


def test_the_page_loads_nothing_from_elsewhere():
    page = report_page(make_chain([0.1, 0.2]))
    assert not re.findall(r"""(?:src|href)=["']?(?!#)[^"'>\s]+""", page)
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]


def test_48_blocks_with_full_spectra_stay_below_three_megabytes():
    rng = np.random.default_rng(0)
    z = tuple(map(complex, rng.normal(size=4096) + 1j * rng.normal(size=4096)))
    page = report_page(make_chain(list(rng.normal(size=48)), z=z))
    assert len(page.encode()) < 3e6


def test_thinned_spectra_keep_the_largest_eigenvalue_and_say_how_many_there_were():
    z = tuple(complex(i) for i in range(5000))
    (step,) = report_data(make_report(make_step(z=z)))["steps"]
    assert step["count"] == 5000
    assert len(step["z"]) == EIGENVALUES
    assert step["z"][0] == [4999.0, 0.0]


def test_the_worst_finding_chooses_the_step_shown_first():
    report = make_report(*(make_step(i, growth=float(i)) for i in range(3)), findings=(FINDING,))
    assert report_data(report)["first"] == 0
    assert report_data(make_report(*report.steps))["first"] == 2


def test_every_finding_and_note_is_on_the_page_without_any_script():
    report = make_report(make_step(notes=("half of the units are zero",)), findings=(FINDING,))
    page = report_page(report)
    for text in (FINDING.evidence, FINDING.remedy, FINDING.reference, "half of the units are zero", "a note"):
        assert text in page


def test_a_comparison_lines_up_steps_by_name():
    first = make_report(make_step(0, name="a", growth=1.0), make_step(1, name="b", growth=2.0))
    second = make_report(make_step(0, name="b", growth=3.0))
    data = comparison_data({"x": first, "y": second})
    assert data["steps"] == ["a", "b"]
    assert data["growth"] == [[1.0, 2.0], [None, 3.0]]


def test_a_comparison_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        comparison_page({})
