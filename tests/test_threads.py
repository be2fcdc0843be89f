"""Small matrices take one BLAS thread, and give the others back."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

from stabkit.jacobians import eigenvalues
from stabkit.threads import SMALL, single_threaded, torch_threads


def threads() -> dict[str, int]:
    scipy.linalg.norm(np.eye(2))  # loads scipy's library
    return {one["filepath"]: one["num_threads"] for one in ThreadpoolController().info() if one["user_api"] == "blas"}


@pytest.fixture
def two_threads():
    with ThreadpoolController().limit(limits=2):
        yield threads()


def of_numpy(found: dict[str, int]) -> set[int]:
    return {count for path, count in found.items() if "torch" not in path}


def test_threads_come_back_also_after_an_error(two_threads):
    seen = []

    def fails() -> None:
        with single_threaded(64):
            with single_threaded(8):
                pass
            seen.append(threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert of_numpy(seen[0]) == {1}
    assert threads() == two_threads


def test_large_matrices_keep_all_threads(two_threads):
    with single_threaded(SMALL + 1):
        assert threads() == two_threads


def test_a_spectrum_of_small_matrices_takes_one(two_threads, monkeypatch):
    seen = []
    whole = scipy.linalg.eig
    monkeypatch.setattr(scipy.linalg, "eig", lambda *args, **kw: (seen.append(threads()), whole(*args, **kw))[1])
    eigenvalues(np.random.default_rng(0).normal(size=(3, 5, 5)))
    assert len(seen) == 3
    assert all(of_numpy(found) == {1} for found in seen)
    assert threads() == two_threads


def test_torch_takes_one_thread_for_small_states_and_has_its_own_again():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch_threads(1000):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with torch_threads(10**6):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
