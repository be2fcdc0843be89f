from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.distributed import RankError, Ranks
from stabkit.distributed.ranks import assigned
from tests.distributed.programs import on_ranks, together


def test_pieces_are_done_once_and_come_back_in_order_on_every_rank():
    found = [told["shared"] for told in together(2)]
    assert sorted(found[0]["mine"] + found[1]["mine"]) == [0, 1, 2, 3, 4]
    assert all(one["results"] == [0, 1, 4, 9, 16] for one in found)
    assert all(one["type"] == "RankError" for one in found)
    assert all("failed: ValueError: no such piece" in one["error"] for one in found)


def test_a_dead_rank_ends_the_run_and_what_was_finished_is_kept():
    survivor, dead = on_ranks(2, "dying", die=1)
    assert dead is None
    assert "another of the 2 ranks is gone" in survivor["error"]
    assert survivor["finished"] == {0: 0.0, 2: 1.0}
    (kept,) = map(json.loads, survivor["kept"])
    assert kept["step"] == {"0": 0.0, "2": 1.0}


def test_ranks_that_do_not_agree_are_told_and_one_may_go_alone():
    first, second = on_ranks(2, "meeting")
    for told in (first, second):
        assert "on rank 1 was given another model or input than on rank 0" in told["other input"]
        assert told["verdict"] == "stable"
        assert told["raised"] == "piece 1"
    assert first["alone"] == "stable"
    assert first["said"] == [
        "rank 0 of 2 waits for the others to call stabkit.analyze too; to call it on one rank only, give "
        "distributed=False"
    ]


def test_one_process_does_everything_itself_and_raises_what_fails():
    assert Ranks().share(lambda piece: -piece, [1.0, 1.0]) == [0, -1]
    with pytest.raises(ZeroDivisionError):
        Ranks().share(lambda piece: 1 // piece, [1.0])
    assert issubclass(RankError, Exception)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.integers(1, 5))
def test_no_rank_has_more_to_do_than_the_rest_by_more_than_one_piece(costs, ranks):
    owners = assigned(costs, ranks)
    load = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert set(owners) <= set(range(ranks))
    assert max(load) <= min(load) + max(costs) + 1e-9
