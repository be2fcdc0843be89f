from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from stabkit.checkpoints import load
from stabkit.checkpoints.directories import refuse_other_directories
from stabkit.errors import CheckpointError


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["latest", "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_to_fp32.py"),
        (["model_index.json", "unet/config.json", "vae/config.json"], "give one: unet, vae"),
        (["last.ckpt", "notes.txt"], r"give one of its files: last\.ckpt"),
        (["checkpoint-2/model.safetensors", "runs/log", "a.txt"], r"give one of its folders: checkpoint-2$"),
        (["notes.txt"], r"it holds notes\.txt"),
        ([], "it holds nothing"),
    ],
)
def test_other_directories_say_what_to_do(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message):
        refuse_other_directories(tmp_path)


def test_whole_weights_beside_a_sharded_state_are_used(tmp_path, network, state):
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"9 tensors.*--model"):
        load(tmp_path)
    model, _ = load(tmp_path, model=network)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_a_directory_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("test_vit", num_classes=7)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 7}))
    loaded = load(tmp_path)
    assert loaded.name == "timm:test_vit"
    assert torch.equal(loaded.model.head.weight, reference.head.weight)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "model_args": {"depth": 3000}}))
    with pytest.raises(CheckpointError, match=r"a model of more than \d+ modules"):
        load(tmp_path)
