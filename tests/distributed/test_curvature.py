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
