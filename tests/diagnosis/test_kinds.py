"""A verdict, a severity or a kind of finding is one entry in one table: all that shows it follows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from stabkit import plotting
from stabkit.diagnosis import FINDINGS, SEVERITIES, VERDICTS, Finding
from stabkit.diagnosis.kinds import Word, accused, rank
from stabkit.errors import ArgumentError
from stabkit.report import terminal
from stabkit.report.page import comparison_page, report_page
from tests.report.synthetic import make_report, make_step


def printed(report) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    terminal.show(report, console)
    return console.file.getvalue()


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_is_shown_everywhere(verdict):
    report = make_report(make_step(), verdict=verdict)
    assert verdict.upper() in printed(report)
    assert verdict in report_page(report)
    assert verdict in comparison_page({"a": report})
    assert VERDICTS[verdict].meaning


@pytest.mark.parametrize("kind", FINDINGS)
def test_every_kind_of_finding_is_shown_everywhere(kind):
    report = make_report(make_step(), findings=(Finding(kind, "critical", (0,), "net", 0.9, "seen", "do", "ref"),))
    assert kind in printed(report)
    assert kind.replace("_", " ") in report_page(report)
    assert kind in str(report)
    assert FINDINGS[kind].meaning


def test_a_new_word_is_one_edit(monkeypatch):
    monkeypatch.setitem(VERDICTS, "oscillating", Word("gradients change sign", "grows"))
    monkeypatch.setitem(FINDINGS, "oscillation", Word("a block changes the sign of gradients", "grows"))
    monkeypatch.setitem(SEVERITIES, "fatal", Word("training is over", "broken"))
    finding = Finding("oscillation", "fatal", (0,), "net", 0.9, "seen", "do", "ref")
    report = make_report(make_step(), verdict="oscillating", findings=(finding,))
    assert "FATAL, OSCILLATION (depth alone: oscillating)" in printed(report)
    alone = make_report(make_step(), verdict="oscillating")
    assert "OSCILLATING" in printed(alone)
    assert 'class="verdict grows">oscillating' in report_page(alone)
    assert report.from_dict(report.to_dict()) == report
    assert rank("fatal") > rank("critical")
    assert accused("critical", finding.kind, finding.severity)
    plotting.overview(report)


def test_a_misspelt_word_is_refused():
    with pytest.raises(ArgumentError, match="kind='explodes'; accepted: 'exploding'"):
        Finding("explodes", "info", (), "", 1.0, "", "", "")
    with pytest.raises(ArgumentError, match="severity='bad'; accepted: 'info', 'warning', 'critical'"):
        Finding("dead", "bad", (), "", 1.0, "", "", "")


@pytest.mark.parametrize(
    ("word", "kind", "severity", "expected"),
    [
        ("warning", "dead", "info", False),
        ("warning", "dead", "warning", True),
        ("rank-collapse", "rank_collapse", "info", True),
        ("dead", "saturated", "critical", False),
        (None, "dead", "critical", False),
    ],
)
def test_what_fails_a_run(word, kind, severity, expected):
    assert accused(word, kind, severity) is expected
