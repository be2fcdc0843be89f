from __future__ import annotations

import io

import pytest
from rich.console import Console

from stabkit.report import terminal
from tests.report.synthetic import FINDING, make_report, make_step


def shown(report, width=80, color=False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    terminal.show(report, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_or_wrapped_in_the_table(width):
    steps = [make_step(i, name="conv1 .. maxpool", source_size=12288, target_size=16384) for i in range(101)]
    rows = [line.rstrip() for line in shown(make_report(*steps), width).splitlines() if "12288>16384" in line]
    assert len(rows) == 101
    assert all(row.startswith(f"{i:>3}") and len(row) <= width for i, row in enumerate(rows))
    assert all("forward Euler" in row and "+0.50" in row and "…" not in row.split("trans")[-1][30:] for row in rows)


def test_the_wide_table_shows_the_evidence():
    report = make_report(make_step(evidence="measured"))
    assert "measured" in shown(report, 120)
    assert "measured" not in shown(report, 80)


def test_the_verdict_comes_first():
    text = shown(make_report(make_step(), verdict="exploding", findings=(FINDING,)))
    assert text.startswith("Net: EXPLODING\n")
    assert "critical exploding, steps 0-1 at net.0 (confidence 97%)" in text


def test_markup_and_control_characters_of_a_model_are_shown_as_they_are():
    report = make_report(make_step(name="[red]x[/no]", notes=("\x1b[31mred",)), model="[link=http://x]m")
    text = shown(report, 120, color=True)
    assert "[link=http://x]m" in text
    assert "[red]x[/no]" in text
    assert "\\x1b[31mred" in text


def test_a_step_that_is_accused_is_red():
    report = make_report(make_step(0, growth=9.25), make_step(7, growth=0.25), findings=(FINDING,))
    text = shown(report, color=True)
    assert "\x1b[31m+9.25" in text
    assert "\x1b[31m+0.25" not in text


def test_a_note_that_steps_share_is_said_once():
    report = make_report(*(make_step(i, notes=("same",)) for i in range(4)), notes=())
    assert terminal.notes(report) == ["steps 0-3: same"]


def test_many_notes_are_counted():
    report = make_report(*(make_step(i, notes=(f"note {i}",)) for i in range(20)), notes=())
    assert len(terminal.notes(report)) == 9
    assert terminal.notes(report)[-1] == "12 more notes are in the JSON report"


def test_doubt_is_marked_and_explained():
    text = shown(make_report(make_step(spectral_radius=1.75, spectrum_converged=False)))
    assert "~1.75" in text
    assert "has not converged" in text
    assert "has not converged" not in shown(make_report(make_step()))
