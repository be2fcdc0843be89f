from __future__ import annotations

import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stabkit.checkpoints.input_files import read_input_file
from stabkit.errors import CheckpointError

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_every_format_gives_the_same_numbers(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", X)
    torch.save(torch.from_numpy(X), tmp_path / "x.pt")
    torch.save((torch.from_numpy(X),), tmp_path / "tuple.pt")
    save_file({"x": torch.from_numpy(X)}, tmp_path / "x.safetensors")
    for file in tmp_path.iterdir():
        (tensor,) = read_input_file(file).tensors.values()
        assert np.array_equal(tensor.numpy(), X), file


def test_unnamed_arrays_keep_their_order_and_names_are_kept(tmp_path):
    np.savez(tmp_path / "x.npz", X, X + 1)
    np.savez(tmp_path / "named.npz", b=X, a=X + 1)
    plain, named = read_input_file(tmp_path / "x.npz"), read_input_file(tmp_path / "named.npz")
    assert plain.ordered
    assert [float(t[0, 0]) for t in plain.tensors.values()] == [0, 1]
    assert not named.ordered
    assert set(named.tensors) == {"a", "b"}


def test_an_image_is_resized_and_normalised(tmp_path):
    Image.new("RGB", (10, 20), (255, 0, 51)).save(tmp_path / "x.png")
    config = {"mean": (0.5, 0.5, 0.1), "std": (0.5, 0.25, 0.1)}
    read = read_input_file(tmp_path / "x.png", size=(3, 4, 6), config=config)
    (tensor,) = read.tensors.values()
    assert tensor.shape == (1, 3, 4, 6)
    assert torch.allclose(tensor[0, :, 2, 2], torch.tensor([1.0, -2.0, 1.0]))
    (grey,) = read_input_file(tmp_path / "x.png", size=(1, 4, 6)).tensors.values()
    assert grey.shape == (1, 1, 4, 6)
    (own,) = read_input_file(tmp_path / "x.png").tensors.values()
    assert own.shape == (1, 3, 20, 10)


def test_a_header_that_claims_more_than_the_file_has(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(1000))
    raw = bytearray((tmp_path / "bomb.npz").read_bytes())
    at = raw.rindex(b"PK\x01\x02") + 24  # the unpacked size in the central directory
    raw[at : at + 4] = struct.pack("<I", 2**32 - 2)
    (tmp_path / "bomb.npz").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.npy cannot be read as numbers"):
        read_input_file(tmp_path / "x.npy")
    with pytest.raises(CheckpointError, match="unpack to more than"):
        read_input_file(tmp_path / "bomb.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors", ".png"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense" * 9])
def test_a_damaged_file(tmp_path, suffix, content):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.\w+ "):
        read_input_file(tmp_path / f"x{suffix}")


def test_a_header_without_its_end(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.float32))
    raw = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(raw.replace(b"}", b" "))  # numpy's own reader raises tokenize.TokenError
    with pytest.raises(CheckpointError, match="cannot be read as numbers"):
        read_input_file(tmp_path / "x.npy")


def test_what_holds_no_numbers(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array(["a", "b"]))
    for name, message in (("x.pt", "expected a tensor"), ("x.npy", "as numbers"), ("x.txt", "neither a shape")):
        with pytest.raises(CheckpointError, match=message):
            read_input_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="did you mean"):
        read_input_file(tmp_path / "xx.pt")


def test_lines_of_numbers_are_samples(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2.5\n\n-3,4e1\n")
    (read,) = read_input_file(path).tensors.values()
    assert read.tolist() == [[1.0, 2.5], [-3.0, 40.0]]
    path.write_text("3\n1\n")
    (read,) = read_input_file(path).tensors.values()
    assert (read.dtype, read.tolist()) == (torch.int64, [3, 1])
    for content in ("", "a,b\n", "1,2\n3\n", "a\nb\n"):
        path.write_text(content)
        with pytest.raises(CheckpointError):
            read_input_file(path)
