from __future__ import annotations

import pytest
import torch

import stabkit
from stabkit.distributed import gradient_profile
from tests.distributed.programs import batch, on_ranks, residual


@pytest.fixture(scope="module")
def found():
    return on_ranks(2, "wrapped")


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fully_shard", "fully_shard kept", "tensor parallel"])
def test_a_wrapped_model_gives_what_the_model_gives(found, wrapper):
    flow = stabkit.trace(residual(), batch(4, 16))
    profile = stabkit.gradient_profile(flow, probes=2)
    dense = flow.steps[1].jacobian().dense()
    exact = [float(torch.linalg.matrix_norm(step.jacobian().dense()[0].double(), 2)) for step in flow.steps]
    for told in found:
        torch.testing.assert_close(told[wrapper]["growth"], profile.log_growth, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(told[wrapper]["dense"], dense, rtol=1e-4, atol=1e-5)
        assert told[wrapper]["norms"] == pytest.approx(exact, rel=2e-3)


def test_mixed_precision_is_kept(found):
    profile = gradient_profile(residual(), batch(4, 16), probes=2)
    total = found[0]["fully_shard bf16"]["growth"].sum(0)  # casts are steps of their own
    difference = (total - profile.log_growth.sum(0)).abs().max()
    assert 1e-5 < float(difference) < 0.05


def test_parameters_and_hooks_are_afterwards_where_they_were(found):
    for told in found:
        assert told["fully_shard"]["parameters"] == "DTensor"
        assert all(one["same"] for name, one in told.items() if name not in ("trained", "alone", "loaded"))
        assert told["trained"]


def test_a_model_in_parts_cannot_be_analysed_by_one_rank(found):
    assert all("parameters are spread over the ranks" in told["alone"] for told in found)


def test_a_distributed_checkpoint_is_loaded_into_the_parts_that_a_rank_has(found):
    for told in found:
        for loaded in told["loaded"]:
            assert loaded["difference"] < 1e-5
            assert loaded["same"]
