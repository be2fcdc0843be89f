from __future__ import annotations

import argparse
import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stabkit.checkpoints.files import read_file, regular_file
from stabkit.errors import CheckpointError


@pytest.mark.parametrize("zipped", [True, False])
def test_inert_values_beside_the_weights_are_no_obstacle(tmp_path, state, zipped):
    saved = {
        "model": state,
        "args": argparse.Namespace(lr=0.1, arch="resnet18"),
        "epoch": np.int64(3),
        "best": np.float32(0.5),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "torch_rng": torch.get_rng_state(),
    }
    torch.save(saved, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    content = read_file(tmp_path / "last.pt").content
    assert content["args"].entries["arch"] == "resnet18"
    assert torch.equal(content["model"]["2.weight"], state["2.weight"])


def test_arrays_of_numbers_are_read_and_others_are_not(tmp_path):
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.eye(3)[:, :2]), "o": np.array([{}, 1])}
    torch.save(arrays, tmp_path / "arrays.pt")
    content = read_file(tmp_path / "arrays.pt").content
    assert np.array_equal(content["c"].tensor().numpy(), arrays["c"])
    assert np.array_equal(content["f"].tensor().numpy(), arrays["f"])
    assert content["o"].tensor() is None


def test_the_allow_list_ends_with_the_call(tmp_path, state):
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "last.pt")
    read_file(tmp_path / "last.pt")
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "last.pt", weights_only=True)


def test_a_class_that_the_caller_allowed_in_torch_is_read(tmp_path, state):
    torch.save({"model": state, "where": pathlib.PurePosixPath("a/b")}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"pathlib\.(_local\.)?PurePosixPath"):
        read_file(tmp_path / "last.pt")
    with torch.serialization.safe_globals([pathlib.PurePosixPath]):
        assert read_file(tmp_path / "last.pt").content["where"] == pathlib.PurePosixPath("a/b")


def test_a_pickled_module_is_refused_with_its_classes_and_read_when_trusted(tmp_path, network):
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*--trust-pickle"):
        read_file(tmp_path / "whole.pt")
    assert isinstance(read_file(tmp_path / "whole.pt", trust_pickle=True).content, nn.Sequential)


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short(tmp_path, state, kind, fraction):
    file = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pt")
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * fraction)])
    with pytest.raises(CheckpointError, match=r"cut\.(pt|safetensors)"):
        read_file(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"GGUF" + bytes(64), "GGUF"),
        (b"\x1f\x8b" + bytes(64), "gunzip"),
        (b"epoch,loss\n1,2\n", "not a checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_file(tmp_path / "model.pt")


def test_torchscript_and_exported_programs_are_refused(tmp_path, network):
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:  # the entries torch.jit.save writes
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"scripted/{name}", b"\x80\x02).")
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), tmp_path / "program.pt2")
    for name, message in (("scripted.pt", "TorchScript"), ("program.pt2", r"torch\.export")):
        with pytest.raises(CheckpointError, match=message):
            read_file(tmp_path / name)


def test_a_missing_file_has_a_near_name_and_a_pipe_does_not_block(tmp_path, state):
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"did you mean last\.ckpt"):
        regular_file(tmp_path / "lst.ckpt")
    with pytest.raises(CheckpointError, match="torchvision:resnet18"):
        regular_file(pathlib.Path("resnet18"))
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_file(tmp_path / "pipe.pt")
