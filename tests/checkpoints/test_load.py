from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stabkit.checkpoints import Loaded, load
from stabkit.errors import CheckpointError


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path, network, state):
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": {"state_dict": state}, "epoch": 1, "args": argparse.Namespace(x=1)}, tmp_path / "run.ckpt")
    save_file(state, tmp_path / "flat.safetensors")
    for file in tmp_path.iterdir():
        model, inputs = load(file, model=network, input="4x3")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), file
        assert model(*inputs).shape == (4, 2)


def test_it_unpacks_and_describes_itself(tmp_path, network, state):
    saved = {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}, "model_ema": state}
    torch.save(saved, tmp_path / "last.pt")
    loaded = load(tmp_path / "last.pt", model=network)
    assert isinstance(loaded, Loaded)
    assert tuple(loaded) == (loaded.model, loaded.inputs)
    assert not loaded.model.training
    for part in ("'state_dict'", "raw weights", "'model_ema'", "9 tensors loaded", "'_orig_mod.'", "first layer 0"):
        assert part in loaded.description
    assert json.loads(json.dumps(loaded.to_dict()))["inputs"] == [[1, 3]]


def test_the_average_is_taken_when_asked(tmp_path, network, state):
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "last.pt")
    model, _ = load(tmp_path / "last.pt", model=network, weights="ema")
    assert torch.equal(model[0].weight, state["0.weight"] + 1)


def test_lightning(tmp_path, network, state):
    saved = {
        "state_dict": {f"net.{k}": v for k, v in state.items()},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [torch.optim.Adam(network().parameters()).state_dict()],
    }
    torch.save(saved, tmp_path / "epoch=1.ckpt")
    assert torch.equal(load(tmp_path / "epoch=1.ckpt", model=network).model[0].weight, state["0.weight"])
    saved["state_dict"]["loss.weight"] = torch.ones(2)
    torch.save(saved, tmp_path / "epoch=1.ckpt")
    with pytest.raises(CheckpointError, match=r"unknown to the model.*--key"):
        load(tmp_path / "epoch=1.ckpt", model=network)
    assert load(tmp_path / "epoch=1.ckpt", model=network, key="state_dict.net").model is not None


def test_names_build_models_with_random_weights():
    for name in ("torchvision:squeezenet1_1", "timm:test_vit"):
        loaded = load(name, input="1x3x160x160", factory_args={"num_classes": 4})
        assert loaded.name == name
        assert loaded.model(*loaded.inputs).shape == (1, 4)
        assert "initial weights" in loaded.description


def test_a_checkpoint_of_a_library_model(tmp_path):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("test_vit", num_classes=4).eval()
    torch.save({"arch": "test_vit", "state_dict": reference.state_dict()}, tmp_path / "last.pth")
    loaded = load(tmp_path / "last.pth", model="timm:test_vit", factory_args={"num_classes": 4})
    assert torch.equal(loaded.model(*loaded.inputs), reference(*loaded.inputs))
    with pytest.raises(CheckpointError, match=r"head\.weight: 4x64 in the file.*--factory-args"):
        load(tmp_path / "last.pth", model="timm:test_vit")
    with pytest.raises(CheckpointError, match="perhaps timm:test_vit"):
        load(tmp_path / "last.pth")


def test_a_pickled_module_only_when_trusted(tmp_path, network):
    module = network()
    torch.save({"model": module, "epoch": 1}, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        load(tmp_path / "whole.pt")
    loaded = load(tmp_path / "whole.pt", trust_pickle=True)
    assert torch.equal(loaded.model[0].weight, module[0].weight)
    assert "--trust-pickle" in loaded.description
    again = load(tmp_path / "whole.pt", trust_pickle=True, model=network)
    assert torch.equal(again.model[0].weight, module[0].weight)


def test_weights_that_are_not_numbers_are_named(tmp_path, network, state):
    state["2.bias"][0] = float("inf")
    torch.save(state, tmp_path / "nan.pt")
    assert load(tmp_path / "nan.pt", model=network).non_finite == ("2.bias",)


def test_a_lora_adapter_needs_its_base(tmp_path):
    save_file({"base_model.model.fc.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*base"):
        load(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("run/last.pt", {}, r"no file run/last\.pt"),
        ("", {}, "source is empty"),
        ("a\0b", {}, "no file"),
        ("timm:test_vit", {"weights": "best"}, "expected 'raw' or 'ema'"),
        ("timm:test_vit", {"model": "timm:test_vit"}, "names another"),
        ("timm:test_vit", {"key": "model", "weights": "ema"}, r"key='model', weights='ema' has no meaning"),
        ("timm:test_vit", {"input": "1x3xK"}, "neither a shape"),
    ],
)
def test_mistakes_in_the_call(tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(source, **options)


def test_the_cause_is_kept(tmp_path, network):
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 nothing else")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "bad.pt", model=network)
    assert caught.value.__cause__ is not None
    with pytest.raises(CheckpointError) as caught:
        load("timm:test_vit", factory_args={"depth": "x"})
    assert isinstance(caught.value.__cause__, TypeError)


def test_the_global_generators_stay(tmp_path, network, state):
    torch.save(state, tmp_path / "last.pt")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same = (load(tmp_path / "last.pt", model=lambda: nn.Sequential(*network())).inputs[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
