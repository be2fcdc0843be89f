from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import stabkit
from tests.distributed.programs import analysed, batch, compared, residual, streamed, together


def leaves(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict | list):
        for key, child in item.items() if isinstance(item, dict) else enumerate(item):
            yield from leaves(child, f"{path}.{key}")
    else:
        yield path, item


@pytest.mark.parametrize("count", [2, 4])
def test_reports_on_several_ranks_are_those_of_one(count):
    alone = dict(leaves(analysed()))
    for found in together(count):
        told = dict(leaves(found["analysed"]))
        assert told.keys() == alone.keys()
        for path, value in alone.items():
            rounded = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            assert told[path] == rounded, path


def test_a_report_of_one_process_is_the_plain_one():
    plain = stabkit.analyze(residual(depth=3), batch(6, 16), probes=3).to_dict()
    plain.pop("seconds")
    assert analysed()[0] == plain


@pytest.mark.parametrize("count", [2, 4])
def test_a_streamed_walk_on_several_ranks_is_that_of_one(count):
    alone = dict(leaves(streamed()))
    for found in together(count):
        told = dict(leaves(found["streamed"]))
        assert told.keys() == alone.keys()
        for path, value in alone.items():
            assert told[path] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), path


def test_checkpoints_are_compared_by_all_ranks_and_found_again():
    first, again = compared()
    assert [cached for cached, _ in first + again] == [False, False, True, True]
    for told in together(2):
        growth = [[total for _, total in one] for one in told["compared"]]
        assert growth[0] == growth[1] == pytest.approx([total for _, total in first])
        assert [cached for one in told["compared"] for cached, _ in one] == [False, False, True, True]
