"""A checkpoint that is cut short while it is read, or afterwards, is an error or no matter; it ends no process."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

import stabkit
from stabkit.checkpoints import files, mapped
from stabkit.checkpoints.mapped import read_mapped
from stabkit.errors import CheckpointError


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 300))


def written(path):
    """A training dict whose optimizer is larger than its weights, or the weights alone."""
    weights = net().state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({"model": weights, "optimizer": {"exp_avg": torch.ones(2000, 300)}, "step": torch.tensor(7)}, path)
    return weights


@pytest.mark.parametrize("name", ["last.pt", "last.safetensors"])
@pytest.mark.parametrize("cut", [0, 5000])
def test_weights_outlive_their_file(tmp_path, name, cut):
    path = tmp_path / name
    weights = written(path)
    loaded = stabkit.load(path, model=net, input="2x300")
    with path.open("r+b") as stream:
        stream.truncate(cut)
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert stabkit.analyze(loaded.model, *loaded.inputs, spectrum="none").steps


@pytest.mark.parametrize("name", ["last.pt", "last.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "anew"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, name, how):
    path = tmp_path / name
    written(path)
    real = files.read_mapped

    def meanwhile(given, tensors, **options):
        tensors = list(tensors)
        if how == "anew":
            path.write_bytes(bytes(path.stat().st_size))
        else:
            with path.open("r+b") as stream:
                stream.truncate(9000 if how == "cut" else 0)
        return real(given, tensors, **options)

    monkeypatch.setattr(files, "read_mapped", meanwhile)
    with pytest.raises(CheckpointError, match="cut short"):
        stabkit.load(path, model=net, input="2x300")


def test_what_is_not_needed_stays_in_the_file_and_shared_memory_is_shared(tmp_path):
    shared = torch.arange(40_000.0)
    torch.save({"a": shared, "b": shared.view(200, 200).T, "other": torch.ones(300, 300)}, tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", mmap=True)
    read_mapped(tmp_path / "x.pt", [content["a"], content["b"]])
    with (tmp_path / "x.pt").open("r+b") as stream:
        stream.truncate(0)
    assert torch.equal(content["b"], shared.view(200, 200).T)
    assert content["a"].untyped_storage().data_ptr() == content["b"].untyped_storage().data_ptr()


def test_where_nobody_can_tell_what_is_mapped_nothing_is(tmp_path, monkeypatch):
    for module in (mapped, files):
        monkeypatch.setattr(module, "CAN_MAP", False)
    weights = written(tmp_path / "last.pt")
    held = files.read_file(tmp_path / "last.pt", mapped=True).content["model"]
    with (tmp_path / "last.pt").open("r+b") as stream:
        stream.truncate(0)
    assert all(torch.equal(held[key], value) for key, value in weights.items())
