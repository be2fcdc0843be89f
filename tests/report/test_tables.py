from __future__ import annotations

import csv
import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.errors import ReportError
from stabkit.report import formats, tables
from tests.report.synthetic import FINDING, make_chain, make_report, make_step, make_training

LONG = "model.encoder.transformer.layers.encoder_layer_11.residual"


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_keeps_to_its_width(width):
    large = {"name": LONG, "source_size": 150528, "target_size": 802816, "method": "damped Euler (a = 0.775)"}
    steps = [make_step(i, **large) for i in range(120)]
    text = tables.plain(make_report(*steps), width)
    rows = [line for line in text.splitlines() if "802816" in line]
    assert len(rows) == 120
    assert max(map(len, rows)) <= width


def test_the_text_has_every_number_of_the_issue():
    text = str(make_report(make_step(growth=0.25), findings=(FINDING,)))
    for part in (
        "Net: CRITICAL, EXPLODING (depth alone: stable)",
        "blocks.0",
        "step",
        "12",
        "forward Euler",
        "1.25",
        "1.50",
        "25%",
        "+0.25",
        "exploding",
    ):
        assert part in text
    assert "scale the branches" in text
    assert "a note" in text


@settings(deadline=None, max_examples=200)
@given(st.text(), st.integers(8, 40))
def test_a_name_is_cut_to_its_width_and_keeps_its_ends(name, width):
    cut = formats.middle(name, width)
    assert len(cut) == min(len(name), width)
    assert cut[:3] == name[:3]
    assert cut[-3:] == name[-3:]


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e300, 1e300))
def test_figures_are_the_number_to_two_digits(value):
    assert float(formats.figures(value)) == pytest.approx(value, rel=0.05, abs=0)


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 40), min_size=1))
def test_step_names_hold_every_index_once(indices):
    text = formats.steps_named(tuple(indices)).split(" ", 1)[1]
    found: list[int] = []
    for run in text.split(", "):
        ends = [int(end) for end in run.split("-")]
        found += range(ends[0], ends[-1] + 1)
    assert found == sorted(indices)


def test_no_control_character_reaches_the_terminal():
    report = make_report(make_step(name="a\x1b[2Jb", method="\x07"), model="\x1b]0;title\x07", notes=("\x9b31m",))
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in str(report))


def test_csv_holds_no_formula_and_empty_cells_for_what_is_absent():
    report = make_report(make_step(name="=1+1", z=None, skip=None, growth=-1.5))
    (row,) = csv.DictReader(io.StringIO(tables.csv_text(report)))
    assert row["name"] == "'=1+1"
    assert row["skip"] == row["n_eigenvalues"] == ""
    assert float(row["growth"]) == -1.5


def test_an_empty_report_has_headings():
    assert tables.csv_text(make_report()).startswith("index,name,module_path,kind,")
    assert "name" in str(make_report())


def test_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = make_chain([0.5, -1.0]).to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["growth"].tolist() == [0.5, -1.0]
    assert frame.index.tolist() == [0, 1]


def test_data_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ReportError, match="pip install pandas"):
        make_report().to_dataframe()


def test_updates_are_told_with_both_curvatures_where_they_differ():
    text = str(make_report(make_step(), training=make_training(preconditioned=400.0)))
    assert "Largest curvature  30.00 (residual 0.010, converged; preconditioned 400.0" in text
    assert "2 at a rate of 0.100: 2.500 beyond every bound; 1 at a rate of 0.0333: 2.500 to 2.000" in text
    assert "net.blocks.0 75%, net.blocks.1 25% (each alone: 25.0, 5.00)" in text
    assert "a note on updates" in text
    assert "Coming updates" not in str(make_report(make_step()))
