from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stabkit.checkpoints import load
from stabkit.errors import CheckpointError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)

    def forward(self, tokens):
        return self.second(torch.tanh(self.first(self.embedding(tokens))))


def by_hand(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}))
    return folder


FACTORS = {
    "base_model.model.first.lora_A.weight": torch.arange(12.0).reshape(2, 6),
    "base_model.model.first.lora_B.weight": torch.arange(16.0).reshape(8, 2),
}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = Small()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    return model


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"first": 2}}, 1.0),
        ({"alpha_pattern": {"irst": 2}}, 4.0),
    ],
)
def test_the_product_of_the_factors_is_added_with_its_scale(tmp_path, base, config, scale):
    folder = by_hand(tmp_path / "adapter", FACTORS, **config)
    A, B = FACTORS.values()
    for source in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        loaded = load(source, base=tmp_path / "base.pt", model=Small)
        assert torch.allclose(loaded.model.first.weight, base.first.weight + scale * B @ A)
        assert torch.equal(loaded.model.second.weight, base.second.weight)
    assert "1 layers merged" in loaded.description


OPTIONS = {
    "plain": {"target_modules": ["first", "second"]},
    "embedding": {"target_modules": ["embedding", "second"], "use_rslora": True},
    "patterns": {"target_modules": ["first", "second"], "rank_pattern": {"first": 1}, "alpha_pattern": {"second": 3}},
    "dora": {"target_modules": ["first"], "use_dora": True},
    "whole": {"target_modules": ["first"], "modules_to_save": ["second"], "bias": "lora_only"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_peft_merges_to_the_same_model(tmp_path, base, name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=5, **OPTIONS[name]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = load(tmp_path / "adapter", base=tmp_path / "base.pt", model=Small).model
    merged = tuned.merge_and_unload()
    tokens = torch.arange(11)[None]
    assert torch.allclose(ours(tokens), merged(tokens), atol=1e-4, rtol=1e-4)
    for n, value in merged.state_dict().items():
        assert torch.allclose(ours.state_dict()[n], value, atol=1e-5), n


@pytest.mark.filterwarnings("ignore")
def test_peft_on_a_hugging_face_model_with_transposed_weights(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50, n_positions=12, bos_token_id=0)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=7, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    for n, parameter in tuned.named_parameters():
        if "lora" in n:
            parameter.data.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", base=tmp_path / "base")
    with torch.no_grad():
        reference = tuned.eval()(*loaded.inputs).logits
        assert torch.allclose(loaded.model(*loaded.inputs).logits, reference, atol=1e-5)
    with pytest.raises(CheckpointError, match="--base"):
        load(tmp_path / "adapter")


def test_a_base_given_as_a_module_or_half_precision(tmp_path, base):
    folder = by_hand(tmp_path / "adapter", FACTORS)
    A, B = FACTORS.values()
    expected = base.first.weight.detach() + 4 * B @ A
    half = Small().half()
    half.load_state_dict(base.state_dict())
    weight = half.first.weight
    loaded = load(folder, base=half)
    assert loaded.model.first.weight is weight
    assert torch.allclose(weight.float(), expected, rtol=1e-2, atol=1e-2)
    assert weight.dtype == torch.float16


def edited(name, value):
    return {**FACTORS, name: value}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (FACTORS, {"peft_type": "IA3"}, "IA3"),
        (FACTORS, {"init_lora_weights": "pissa_niter_4"}, "changed base"),
        (FACTORS, {"alpha_pattern": {"(a+)+$": 1}}, "not a plain path"),
        (FACTORS, {"lora_alpha": [1, 2]}, r"lora_alpha for .* is \[1, 2\]"),
        (FACTORS, {"lora_alpha": math.inf}, "is inf in the adapter's config; expected a number"),
        (dict(list(FACTORS.items())[:1]), {}, "expected lora_A and lora_B"),
        (edited("base_model.model.third.lora_A.weight", torch.ones(2, 6)), {}, r"third\.weight"),
        (edited("base_model.model.first.lora_B.weight", torch.ones(8, 3)), {}, "ranks 2 and 3"),
        (edited("base_model.model.first.lora_B.weight", torch.ones(7, 2)), {}, r"shape \(7, 6\)"),
        (edited("base_model.model.first.lora_B.bias", torch.ones(8)), {}, "not merged here"),
        (edited("base_model.model.second.weight", torch.ones(8, 6)), {}, r"second\.weight is \(8, 6\)"),
        ({}, {}, "no tensors"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, base, tensors, config, message):
    folder = by_hand(tmp_path / "adapter", tensors, **config)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(folder, base=base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_base_for_what_is_no_adapter_is_refused(tmp_path, base):
    with pytest.raises(CheckpointError, match=r"base=Small has no meaning.*no LoRA adapter"):
        load(tmp_path / "base.pt", model=Small, base=base)


def test_an_adapter_without_its_config_or_weights(tmp_path, base):
    folder = by_hand(tmp_path / "adapter", FACTORS)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load(tmp_path / "alone.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but no adapter_model"):
        load(folder, base=base)
