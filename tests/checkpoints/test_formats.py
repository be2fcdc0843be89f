from __future__ import annotations

import pytest

from tests.checkpoints import formats


@pytest.mark.parametrize("case", formats.CASES, ids=lambda case: f"{case.what}, {case.tool}")
def test_every_row_does_what_the_table_says(tmp_path, case):
    if missing := formats.missing_tools(case):
        pytest.skip(f"needs {', '.join(missing)}")
    with formats.quiet():
        found = formats.what_happens(case, tmp_path)
    assert formats.holds(case.expected, found), found
