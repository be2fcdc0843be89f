from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.curvature import critical_rate, sharpness
from tests.distributed.programs import labelled, on_ranks, residual


@pytest.fixture(scope="module")
def found():
    return on_ranks(2, "curvature")


@pytest.fixture(scope="module")
def alone():
    model, pairs = residual(), list(zip(*labelled(4), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in pairs[:2]:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    options = {"loss": nn.functional.mse_loss, "batches": pairs, "optimizer": optimizer}
    return sharpness(model, tol=1e-6, **options), critical_rate(model, **options)


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fully_shard"])
def test_ranks_that_share_the_batches_find_what_one_process_finds(found, alone, wrapper):
    one, rate = alone
    for told in found:
        assert told[wrapper]["values"] == pytest.approx(one.values.tolist(), rel=1e-4)
        assert told[wrapper]["preconditioned"] == pytest.approx(one.preconditioned.tolist(), rel=1e-3)
        assert told[wrapper]["gauss_newton"] == pytest.approx(one.gauss_newton.tolist(), rel=1e-3)
        assert told[wrapper]["interval"] == pytest.approx(one.interval, rel=1e-3)
        assert told[wrapper]["loss"] == pytest.approx(one.loss, rel=1e-5)
        assert told[wrapper]["rate"] == pytest.approx(rate.rate, rel=2e-2)
    assert found[0] == found[1]


def test_what_one_rank_refuses_is_refused_on_all_before_they_wait():
    first, second = on_ranks(2, "refusing")
    model, pairs = residual(), list(zip(*labelled(3), strict=True))
    one = sharpness(model, loss=nn.functional.mse_loss, batches=pairs, tol=1e-2, own=0)
    elsewhere = "refused in 1 of the 2 processes"
    for name in ("plain", "fully_shard"):
        assert first[name]["values"] == second[name]["values"] == pytest.approx(one.values.tolist(), rel=1e-3)
        for asked in ("sharpness", "critical_rate"):
            assert elsewhere in first[name][f"{asked} 1"]
            assert elsewhere in second[name][f"{asked} 2"]
            assert "the loss" in second[name][f"{asked} 1"]
            assert elsewhere not in second[name][f"{asked} 1"]
        assert "optimizer is a str" in first[name]["optimizer"]
        assert elsewhere in second[name]["optimizer"]
