"""The zoo runs as a whole with ``-m zoo`` and then prints its table; without a marker only its fast subset runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .zoo import Result, Subject, examine, table

RESULTS = pytest.StashKey[list[Result]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for = "zoo" in config.option.markexpr or config.option.keyword or any("::" in arg for arg in config.args)
    if asked_for:
        return
    slow = [item for item in items if item.get_closest_marker("zoo")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def examined(request: pytest.FixtureRequest) -> Callable[[Subject], Result]:
    """`examine`, with the result kept for the table at the end of the run."""

    def examine_and_keep(subject: Subject) -> Result:
        result = examine(subject)
        request.config.stash.setdefault(RESULTS, []).append(result)
        return result

    return examine_and_keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, [])
    if results and "zoo" in config.option.markexpr:
        terminalreporter.section("zoo")
        terminalreporter.write_line(table(results))
