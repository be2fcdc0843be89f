"""Nothing in a file runs, hangs or leaves anything behind."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from stabkit.checkpoints import load
from stabkit.errors import CheckpointError


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside", "inside", "in the state dict"])
def test_a_planted_payload_is_named_and_does_not_run(tmp_path, network, state, tripwire, zipped, place):
    saved = {
        "alone": tripwire,
        "beside": {"model": state, "epoch": tripwire},
        "inside": {"model": state, "callbacks": [{"deep": (1, tripwire)}]},
        "in the state dict": {**state, "0.weight": tripwire},
    }[place]
    file = tmp_path / "planted.pt"
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"(?s)mkdir.*Nothing was run.*--trust-pickle"):
        load(file, model=network, input="2x3")
    assert sorted(tmp_path.iterdir()) == before


def test_a_payload_after_the_object_of_a_legacy_file_does_not_run(tmp_path, network, state, tripwire):
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    ends = _pickle_ends(data)
    # magic number, protocol, system, object, and fifth the list of storages
    (tmp_path / "planted.pt").write_bytes(data[: ends[3]] + pickle.dumps(tripwire, 2) + data[ends[4] :])
    with pytest.raises(CheckpointError, match="mkdir"):
        load(tmp_path / "planted.pt", model=network)


def _pickle_ends(data: bytes) -> list[int]:
    stream, ends = io.BytesIO(data), []
    for _ in range(5):
        for _op in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    return ends


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_does_not_run(tmp_path, network, tripwire, protocol):
    (tmp_path / "planted.bin").write_bytes(pickle.dumps({"model": tripwire}, protocol))
    with pytest.raises(CheckpointError):
        load(tmp_path / "planted.bin", model=network)


def test_a_pickle_named_safetensors_does_not_run(tmp_path, network, tripwire):
    torch.save(tripwire, tmp_path / "planted.safetensors")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        load(tmp_path / "planted.safetensors", model=network)


def test_a_checkpoint_in_a_zip_is_not_searched(tmp_path, network, tripwire):
    torch.save(tripwire, tmp_path / "inner.pt")
    with zipfile.ZipFile(tmp_path / "outer.pt", "w") as archive:
        archive.write(tmp_path / "inner.pt", "inner.pt")
    with pytest.raises(CheckpointError, match=r"holds inner\.pt"):
        load(tmp_path / "outer.pt", model=network)


@pytest.mark.parametrize("protocol", range(6))
def test_the_pickle_of_a_distributed_checkpoint_does_not_run(tmp_path, tripwire, protocol):
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(tripwire, protocol))
    for source in (tmp_path / "dcp", tmp_path / "dcp" / ".metadata", tmp_path):
        with pytest.raises(CheckpointError, match=r"mkdir.*Nothing was run.*dcp_to_torch"):
            load(source)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "..\\x.bin", "sub/x.bin", "..", "C:x.bin"])
def test_an_index_may_not_point_outside(tmp_path, network, state, name):
    save_file(state, tmp_path / "stolen.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its directory"):
        load(folder, model=network)


def test_a_payload_in_a_shard_or_an_input_does_not_run(tmp_path, network, state, tripwire):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"0.weight": tripwire}, folder / "a.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"0.weight": "a.bin"}}))
    with pytest.raises(CheckpointError, match="mkdir"):
        load(folder, model=network)
    torch.save(state, tmp_path / "good.pt")
    np.save(tmp_path / "x.npy", np.array([tripwire], dtype=object))
    for file in (folder / "a.bin", tmp_path / "x.npy"):
        with pytest.raises(CheckpointError):
            load(tmp_path / "good.pt", model=network, input=file)


def test_a_safetensors_header_that_claims_terabytes(tmp_path, network):
    header = json.dumps({"0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    claims = {"data": struct.pack("<Q", len(header)) + header, "header": struct.pack("<Q", 2**43) + b"{}      "}
    for name, content in claims.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            load(tmp_path / f"{name}.safetensors", model=network)


def test_an_allocation_hidden_in_a_pickle_is_refused(tmp_path, network):
    class Bomb:
        def __reduce__(self):
            return bytearray, (2**40,)

    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"builtins\.bytearray"):
        load(tmp_path / "bomb.pt", model=network)


def test_a_compressed_or_doubled_archive_is_refused(tmp_path, network, state):
    torch.save(state, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(*entries[0])
    for name, message in (("small.pt", "compressed"), ("twice.pt", "two entries of one name")):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name, model=network)


def test_self_references_end(tmp_path, network, state):
    cyclic: dict[str, object] = {"model": state}
    cyclic["again"] = cyclic
    wide: dict[str, object] = {"model": state}
    for _ in range(60):  # 2^60 paths through shared dictionaries
        wide = {"a": wide, "b": wide}
    torch.save(cyclic, tmp_path / "cyclic.pt")
    torch.save(wide, tmp_path / "wide.pt")
    loaded = load(tmp_path / "cyclic.pt", model=network)
    assert torch.equal(loaded.model.state_dict()["0.weight"], state["0.weight"])
    with pytest.raises(CheckpointError, match="no tensors with names"):
        load(tmp_path / "wide.pt", model=network)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_loads_or_says_why_not(tmp_path, network, state, kind, data):
    good = tmp_path / ("good.safetensors" if kind == "safetensors" else "good.pt")
    if kind == "safetensors":
        save_file(state, good)
    else:
        torch.save({"model": state, "epoch": np.int64(1)}, good, _use_new_zipfile_serialization=kind == "zip")
    content = good.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 300)))
    new = data.draw(
        st.sampled_from([b"", content[start:end] * 2, b"\xff\xff\xff\x7f", b"\x00"]) | st.binary(max_size=8)
    )
    good.write_bytes(data.draw(st.sampled_from([content[:start], content[:start] + new + content[end:]])))
    try:
        loaded = load(good, model=network, input="2x3")
    except CheckpointError as error:
        message = str(error)
    else:
        message = f"{good} gives {list(loaded.model(*loaded.inputs).shape)}"
    assert str(good) in message
    assert len(message) < 2000


@pytest.mark.filterwarnings("ignore")  # torch's own, about saving from a single process
@pytest.mark.parametrize("part", ["metadata", "shard"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_distributed_checkpoint_loads_or_says_why_not(tmp_path, network, state, part, data):
    folder = tmp_path / "dcp"
    if not folder.exists():
        dcp.save({"model": state, "step": 3}, checkpoint_id=str(folder))
        (tmp_path / "good").write_bytes((folder / ".metadata").read_bytes())
        (tmp_path / "good_shard").write_bytes((folder / "__0_0.distcp").read_bytes())
    content = (tmp_path / ("good" if part == "metadata" else "good_shard")).read_bytes()
    (folder / ".metadata").write_bytes((tmp_path / "good").read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 60)))
    new = data.draw(st.sampled_from([b"", content[start:end] * 2, b"\xff\xff\xff\x7f"]) | st.binary(max_size=8))
    changed = data.draw(st.sampled_from([content[:start], content[:start] + new + content[end:]]))
    (folder / (".metadata" if part == "metadata" else "__0_0.distcp")).write_bytes(changed)
    before = sorted(folder.iterdir())
    try:
        loaded = load(folder, model=network, input="2x3")
    except CheckpointError as error:
        message = str(error)
    else:
        message = f"{folder} gives {list(loaded.model(*loaded.inputs).shape)}"
    assert str(folder) in message
    assert len(message) < 2000
    assert sorted(folder.iterdir()) == before
