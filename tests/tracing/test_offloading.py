"""Models that ``device_map`` placed: part of their weights is on disk until their module runs."""

from __future__ import annotations

import pytest
import torch

import stabkit
from stabkit.diagnosis import measure

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

OPTIONS = {"kwargs": {"use_cache": False}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights twice: plain, and with two blocks on disk."""
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    config = transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)
    plain = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("weights")
    plain.save_pretrained(folder)
    places = {f"transformer.{name}": "cpu" for name in ("wte", "wpe", "drop", "ln_f", "h.0", "h.3")} | {
        "lm_head": "cpu"
    }
    places |= {"transformer.h.1": "disk", "transformer.h.2": "disk"}
    offload = tmp_path_factory.mktemp("offload")
    placed = transformers.GPT2LMHeadModel.from_pretrained(folder, device_map=places, offload_folder=offload)
    assert {p.device.type for p in placed.parameters()} == {"cpu", "meta"}
    return plain, placed.eval()


def test_a_placed_model_is_analysed_as_it_is(models):
    plain, placed = models
    words = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
    before = [(name, p.device, id(p)) for name, p in placed.named_parameters()]
    expected, found = (stabkit.analyze(model, words, **OPTIONS) for model in models)
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert (ours.name, ours.method) == (theirs.name, theirs.method)
        for name in ("growth", "largest_singular_value", "spectral_radius"):
            value = getattr(theirs, name)
            assert getattr(ours, name) == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6))
    assert found.findings == expected.findings
    assert before == [(name, p.device, id(p)) for name, p in placed.named_parameters()]
    with torch.no_grad():
        torch.testing.assert_close(placed(words).logits, plain(words).logits)


def test_weights_on_disk_are_measured(models):
    plain, placed = (
        measure(stabkit.trace(model, torch.arange(6).view(1, 6), **OPTIONS), probes=1).steps for model in models
    )
    assert any(step.module_path == "transformer.h.1" and step.weights for step in placed)
    for ours, theirs in zip(placed, plain, strict=True):
        assert [w.path for w in ours.weights] == [w.path for w in theirs.weights]
        assert [w.gains for w in ours.weights] == [pytest.approx(w.gains) for w in theirs.weights]


def test_recomputation_fetches_the_weights_again(models):
    words = torch.arange(12).view(2, 6)
    expected, found = (
        stabkit.gradient_profile(stabkit.trace(model, words, memory=memory, **OPTIONS)).log_growth
        for model, memory in zip(models, ("keep", "recompute"), strict=True)
    )
    torch.testing.assert_close(found, expected)
