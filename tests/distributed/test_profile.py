from __future__ import annotations

import pytest
import torch

import stabkit
from stabkit.distributed import gradient_profile
from stabkit.distributed.profile import parts
from stabkit.errors import TraceError
from tests.distributed.programs import batch, convolutional, profiles, residual, together


@pytest.fixture(scope="module")
def alone():
    return profiles()


@pytest.mark.parametrize("count", [2, 4])
def test_profiles_on_several_ranks_are_those_of_one(count, alone):
    for told in together(count):
        found = told["profiles"]
        for name, expected in alone.items():
            for quantity in ("growth", "all", "gradients", "states"):
                torch.testing.assert_close(found[name][quantity], expected[quantity], rtol=2e-5, atol=2e-5, msg=name)
            assert found[name]["batch"] == expected["batch"]
            assert found[name]["loss"] == expected["loss"]
            assert (found[name]["below"] is None) == (expected["below"] is None)


def test_a_profile_of_one_process_is_the_plain_one(alone):
    plain = stabkit.gradient_profile(stabkit.trace(residual(), batch(6, 16)), probes=4, seed=3)
    assert torch.equal(alone["cotangents"]["growth"], plain.log_growth)
    flow = stabkit.trace(convolutional().train(), batch(5, 3, 8, 8))
    mixing = stabkit.gradient_profile(flow, probes=2)
    assert alone["mixing"]["batch"] == 1
    assert torch.equal(alone["mixing"]["growth"], mixing.log_growth)


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("probes", [1, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_every_sample_and_probe_is_measured_once(samples, probes, ranks):
    shares = parts(samples, probes, ranks)
    cells = [(s, p) for share in shares if not share.empty for s in range(*share.samples) for p in range(*share.probes)]
    assert len(shares) == ranks
    assert sorted(cells) == [(s, p) for s in range(samples) for p in range(probes)]
    assert all(share.samples[0] < share.samples[1] for share in shares)


def test_a_loss_with_several_cotangents_is_refused():
    with pytest.raises(TraceError, match="a loss has one gradient"):
        gradient_profile(residual(), batch(2, 16), loss=torch.sum, probes=2)
