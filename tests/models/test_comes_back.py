"""Whatever awkward models do when they run is put back, whoever runs them; the whole table is a command."""

from __future__ import annotations

import pytest

from .awkward import CASES
from .comes_back import ANALYZERS, cell

# every model under the trace that all else begins with, and one analyzer more for each, in turn
_SHARED = [name for name in ANALYZERS if name not in ("trace", "budget", "analyze, optimizer")]
_REFUSED = {"generator", "raises after a write", "lazy modules"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_trace_leaves_everything_as_it_was(name):
    found = cell(name, "trace")
    assert not found.failed, str(found)
    assert bool(found.refused) == (name in _REFUSED), found.refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tuple of tensors", "weights of the engine's parts"])
def test_an_iterated_map_that_writes_to_no_parameter_is_watched_all_along(name):
    found = cell(name, "iterate")
    assert not found.failed, str(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "analyzer"), [(n, _SHARED[i % len(_SHARED)]) for i, n in enumerate(CASES) if i % 2])
def test_other_analyzers_leave_everything_as_it_was(name, analyzer):
    found = cell(name, analyzer)
    assert not found.failed, str(found)


def test_the_table_is_large_enough():
    assert len(CASES) >= 100
    assert len(ANALYZERS) >= 18
