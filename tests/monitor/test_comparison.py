"""The comparison with other tools: one failing run under each, and a tool that is not installed."""

from __future__ import annotations

import pytest

from tests.monitor import comparison
from tests.monitor.comparison import STORIES, TOOLS, Story, Tool, cells, loud, page, told
from tests.monitor.other_tools import installed
from tests.monitor.stories import AT

NAN = next(story for story in STORIES if story.fault == "nan")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_tool_speaks_at_the_batch_that_holds_a_nan(tool: type[Tool]):
    if not installed(tool):
        pytest.skip(f"{tool.package} is not installed")
    row = told(NAN, tool)
    assert (row.said, row.early) == (0, 0)
    assert row.cause == (tool.name in ("stabkit.Monitor", "DebugUnderflowOverflow"))
    assert (row.place == 0) == (tool.name != "ignite")
    assert cells(NAN, row)[0] == "N + 0"


def test_a_tool_that_is_missing_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "TOOLS", TOOLS[:2])
    monkeypatch.setattr(comparison, "installed", lambda tool: tool.package == "torch")
    text = page((Story("healthy", "", "SGD"),))
    assert "| DebugUnderflowOverflow | not installed |" in text
    assert "| stabkit.Monitor | never |" in text


def test_a_number_shows_a_fault_from_ten_times_outside_of_its_range():
    before = {step: {"x": 1.0 + step % 2} for step in range(AT)}
    assert loud({**before, AT: {"x": 19.0}}) is None
    for value in (21.0, 0.09, float("nan"), float("inf")):
        assert loud({**before, AT + 3: {"x": value}}) == AT + 3
