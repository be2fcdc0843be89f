from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit.comparison import Comparison, Snapshot
from stabkit.comparison.result import fitted
from stabkit.errors import ReportError
from stabkit.plotting import sweep
from tests.report.synthetic import make_chain


def comparison(growths, steps=None, over_time=True) -> Comparison:
    steps = range(len(growths)) if steps is None else steps
    snapshots = [
        Snapshot(f"run/{i}.pt", "non-finite", step, "epoch", message="NaN in w")
        if growth is None
        else Snapshot(f"run/{i}.pt", "analysed", step, "epoch", report=make_chain([growth] * 5))
        for i, (growth, step) in enumerate(zip(growths, steps, strict=True))
    ]
    return Comparison(tuple(snapshots), over_time)


def test_total_growth_lies_over_the_training_steps():
    found = comparison([0.1, None, -0.4], steps=[0.0, 100.0, 1000.0])
    ax = sweep.total_growth(found)
    line = max(ax.lines, key=lambda line: len(line.get_xdata()) if line.get_linewidth() == 0.8 else 0)
    assert np.array_equal(line.get_xdata(), [0, 1000])
    assert np.allclose(line.get_ydata(), [s.total_growth for s in found.analysed])
    assert ax.get_xlabel() == "epoch"
    assert any(line.get_marker() == "x" and line.get_xdata()[0] == 100 for line in ax.lines)


def test_colors_show_the_growth_of_every_step():
    found = comparison([0.1, None, -0.4])
    ax = sweep.step_growth(found)
    shown = ax.images[0].get_array()
    assert np.allclose(shown[:, 0], found.growth[0])
    assert shown.mask[:, 1].all()
    assert ax.images[0].get_clim() == pytest.approx((-0.4, 0.4))


def test_checkpoints_without_common_steps_say_so():
    one, other = comparison([0.1]).snapshots[0], comparison([0.1]).snapshots[0]
    found = Comparison((one, Snapshot("b", "analysed", report=make_chain([0.1, 0.2]))), False)
    assert found.step_names == ()
    assert "no steps in common" in sweep.step_growth(found).texts[0].get_text()
    assert other.report is not None
    assert all(math.isnan(drift.step_change) for drift in found.drift)


@pytest.mark.parametrize("growths", [[0.1], [None], [0.1, 0.2] * 20])
def test_few_and_many_can_be_drawn(growths):
    found = comparison(growths)
    assert len(sweep.overview(found).axes) >= 3
    found.plot()


def test_the_table_keeps_what_matters_most_where_it_is_narrow():
    found = comparison([0.1, -0.4])
    for width in (60, 80, 120, 200):
        table = fitted(found, width)
        assert {"checkpoint", "step", "verdict", "growth", "findings"} <= set(table[0])
    assert len(fitted(found, 200)[0]) == 12
    assert len(fitted(found, 60)[0]) < 12
    assert "run/0.pt" in str(found)


def test_the_page_names_every_checkpoint_once_even_when_steps_repeat(tmp_path):
    page = comparison([0.1, None, -0.4], steps=[100.0, 100.0, 100.0]).save(tmp_path / "c.html").read_text()
    assert "<td>100</td>" in page
    assert "<td>run/2.pt</td>" in page
    with pytest.raises(ReportError, match="nothing to show"):
        comparison([None]).save(tmp_path / "empty.html")
