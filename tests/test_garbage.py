"""What is collected while many objects are made."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import stabkit
from stabkit.garbage import young_only


class _Node:
    def __init__(self) -> None:
        self.me = self


def test_cycles_that_are_made_and_dropped_are_freed() -> None:
    with young_only():
        gone = weakref.ref(_Node())
        kept = [_Node() for _ in range(2 * gc.get_threshold()[0])]
    assert gone() is None
    assert len(kept) > 0


def test_no_full_collection_while_a_deep_network_is_traced() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(300)])
    full: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2 and gc.get_threshold()[2] > 10**6:
            full.append(1)

    gc.callbacks.append(note)
    try:
        stabkit.trace(model, torch.randn(2, 4))
    finally:
        gc.callbacks.remove(note)
    assert not full


def test_thresholds_come_back_after_an_error() -> None:
    before = gc.get_threshold()

    def fail() -> None:
        with young_only():
            assert gc.get_threshold() != before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert gc.get_threshold() == before
