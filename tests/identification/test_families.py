from __future__ import annotations

import pytest

from .families import FAMILIES, run


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_read_as_it_is_written(family):
    outcome = run(family)
    assert outcome.record.name == family.expected
    assert outcome.difference is None or outcome.difference < 1e-8
    assert sorted(i for record in outcome.records for i in record.steps) == list(range(len(outcome.flow.steps)))
