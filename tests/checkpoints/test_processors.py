from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stabkit.checkpoints import load
from stabkit.checkpoints.inputs import make_inputs
from stabkit.checkpoints.processors import read_processor
from stabkit.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"size": {"height": 24, "width": 40}}, (24, 40)),
        ({"size": 30}, (30, 30)),
        ({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, (32, 32)),
        ({"size": {"shortest_edge": 36}, "crop_size": 32, "do_center_crop": False}, (36, 36)),
        ({"size": {"shortest_edge": 36, "longest_edge": 90}}, None),
        ({"image_processor": {"size": [16, 20]}}, (16, 20)),
        ({}, None),
    ],
)
def test_the_size_that_images_have_in_the_end(tmp_path, config, size):
    write(tmp_path, "preprocessor_config.json", **config)
    assert read_processor(tmp_path).size == size


@pytest.mark.parametrize(
    "config", [{"size": "big"}, {"size": -3}, {"size": [1, 2, 3]}, {"image_std": [0.0]}, {"image_mean": ["x"]}]
)
def test_a_processor_that_makes_no_sense(tmp_path, config):
    write(tmp_path, "preprocessor_config.json", **config)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json has"):
        read_processor(tmp_path)


def test_no_processor(tmp_path):
    assert read_processor(tmp_path) is None


def test_an_image_is_prepared_as_the_directory_says(tmp_path):
    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16,
                               image_size=32, patch_size=8)
    )  # fmt: skip
    vit.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    write(tmp_path, "preprocessor_config.json", size={"height": 32, "width": 32}, image_mean=mean, image_std=std)
    made = load(tmp_path)
    assert made.inputs[0].shape == (1, 3, 32, 32)
    assert "preprocessor_config.json" in made.description

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    ours = load(tmp_path, input=tmp_path / "x.png").inputs[0]
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert torch.allclose(ours, theirs, atol=1e-5)


class Reader(nn.Module):
    def __init__(self, words: int):
        super().__init__()
        self.words = nn.Embedding(words, 4)
        self.main_input_name = "input_ids"
        self.config = transformers.PretrainedConfig(vocab_size=words)

    def forward(self, tokens):
        return self.words(tokens)


def test_a_text_is_encoded_by_the_tokenizer_beside_the_model(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", model_max_length=5)
    processor = read_processor(tmp_path)
    made = make_inputs(Reader(4), "text:the cat sat down", processor=processor)
    assert made.args[0].tolist() == [[1, 2, 3, 0]]
    assert make_inputs(Reader(4), "text:the the the the the the", processor=processor).args[0].shape == (1, 5)
    assert make_inputs(Reader(4), processor=processor).args[0].shape == (1, 5)
    with pytest.raises(CheckpointError, match="up to 3, but the model has 2"):
        make_inputs(Reader(2), "text:the cat sat", processor=processor)
    with pytest.raises(CheckpointError, match=r"needs the tokenizer\.json"):
        make_inputs(Reader(4), "text:the cat")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_inputs(Reader(4), "text:the cat", processor=processor)
