"""A format of checkpoints is one entry: how it is known, and what reads it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from stabkit.checkpoints import dispatch, load
from stabkit.checkpoints.dispatch import FILES, FOLDERS, Format, Options
from stabkit.checkpoints.opened import Opened
from stabkit.errors import CheckpointError


def test_a_new_format_is_one_edit(tmp_path, monkeypatch):
    def read(path, options: Options) -> Opened:
        layer = nn.Linear(2, 2)
        layer.weight.data = torch.tensor(json.loads(path.read_text()))
        return Opened(layer, "layer", ("format: numbers in JSON",))

    known = Format("numbers", lambda path, _: path.suffix == ".numbers", read)
    monkeypatch.setattr(dispatch, "FILES", (known, *FILES))
    (tmp_path / "w.numbers").write_text("[[1.0, 2.0], [3.0, 4.0]]")
    loaded = load(tmp_path / "w.numbers", input="1x2")
    assert loaded.model.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert "numbers in JSON" in loaded.description


@pytest.mark.parametrize("formats", [FILES, FOLDERS])
def test_the_last_format_knows_everything_that_is_left(formats, tmp_path):
    assert formats[-1].holds(tmp_path / "nowhere", Options())


def test_an_adapter_is_not_taken_for_the_model_beside_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"0")
    for path in (tmp_path, tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="--base"):
            load(path)
    (tmp_path / "model.safetensors").write_bytes(b"0")
    with pytest.raises(CheckpointError, match=r"damaged|not a valid"):
        load(tmp_path, model=lambda: nn.Linear(2, 2))
