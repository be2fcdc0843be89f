"""The zoo prints its table where it is asked for: ``-m zoo``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .zoo import Result, Subject, examine, table

RESULTS = pytest.StashKey[list[Result]]()


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
