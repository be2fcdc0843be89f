from __future__ import annotations

import pytest

from .real_models import MODELS, count, read


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_library_model_is_read_as_it_is_known(model):
    records = read(model)
    found = count(records)
    assert {name: found[name] for name in model.expected} == model.expected
    assert all(r.evidence in ("proven", "measured") for r in records)
