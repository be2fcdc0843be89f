from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stabkit.checkpoints import ArchitectureMissingError, load
from stabkit.checkpoints.distributed import read_distributed
from stabkit.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about saving from a single process


def saved(folder: Path, content: dict) -> Path:
    dcp.save(content, checkpoint_id=str(folder))
    return folder


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def split_in_two(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """What two ranks of FSDP would have written: the rows of one tensor in two files."""
    halves = [(0, tensor[:1]), (1, tensor[1:])]

    def edit(metadata: Metadata) -> None:
        info = type(next(iter(metadata.storage_data.values())))
        metadata.storage_data = {i: v for i, v in metadata.storage_data.items() if i.fqn != name}
        chunks = []
        for rank, (row, half) in enumerate(halves):
            file = folder / f"__{rank}_9.distcp"
            file.write_bytes(b"before" + _bytes(folder, half))
            offset = torch.Size([row, *[0] * (tensor.dim() - 1)])
            chunks.append(ChunkStorageMetadata(offset, half.shape))
            length = file.stat().st_size - 6
            metadata.storage_data[MetadataIndex(name, offset)] = info(file.name, 6, length)
        properties = TensorProperties.create_from_tensor(tensor)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)

    change(folder, edit)


def _bytes(folder: Path, tensor: torch.Tensor) -> bytes:
    torch.save(tensor.clone(), folder / "scratch")
    data = (folder / "scratch").read_bytes()
    (folder / "scratch").unlink()
    return data


def test_every_tensor_comes_back_as_torch_reads_it(tmp_path, network, state):
    folder = saved(tmp_path / "dcp", {"model": state, "optim": {"lr": 0.1, "state": [torch.ones(3)]}, "step": 700})
    loaded = load(folder, model=network)
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.step == ("step", 700.0)
    assert "key 'model'" in loaded.description

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(str(folder), str(tmp_path / "model.pt"))
    converted = load(tmp_path / "model.pt", model=network).model.state_dict()
    assert all(torch.equal(value, converted[name]) for name, value in loaded.model.state_dict().items())


def test_a_flat_state_dict_and_any_file_of_the_directory(tmp_path, network, state):
    folder = saved(tmp_path / "dcp", {f"module.{name}": value for name, value in state.items()})
    for source in (folder, folder / ".metadata", next(folder.glob("*.distcp")), tmp_path):
        assert torch.equal(load(source, model=network).model[0].weight, state["0.weight"])


def test_shards_are_put_together(tmp_path, network, state):
    folder = saved(tmp_path / "dcp", state)
    split_in_two(folder, "0.weight", state["0.weight"])
    model, _ = load(folder, model=network)
    assert torch.equal(model[0].weight, state["0.weight"])
    (folder / "__1_9.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"no file .*__1_9\.distcp"):
        load(folder, model=network)


def test_the_folder_of_the_model_is_found_beside_that_of_the_optimizer(tmp_path, network, state):
    saved(tmp_path / "optimizer_0", {"optimizer": {"momentum": torch.ones(2)}})
    saved(tmp_path / "pytorch_model_fsdp_0", {"model": state})
    assert torch.equal(load(tmp_path, model=network).model[0].weight, state["0.weight"])
    saved(tmp_path / "another", {"model": state})
    with pytest.raises(CheckpointError, match=r"several.*another.*pytorch_model_fsdp_0"):
        load(tmp_path, model=network)


def test_without_an_architecture_the_tensors_are_read_one_by_one(tmp_path, state):
    folder = saved(tmp_path / "dcp", {"model": state})
    with pytest.raises(ArchitectureMissingError) as caught:
        load(folder)
    tensors = caught.value.weights.tensors
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)


def claim(name: str, **changes) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                for attribute, value in changes.items():
                    setattr(info, attribute, value)

    return edit


def inflate(metadata: Metadata) -> None:
    size = torch.Size([2**40, 3])
    stored = metadata.state_dict_metadata["0.weight"]
    stored.size, stored.chunks[0].sizes = size, size


def repeat(metadata: Metadata) -> None:
    """A thousand names for one part: each small, together more than the files hold."""
    for i in range(1000):
        metadata.state_dict_metadata[f"again.{i}"] = metadata.state_dict_metadata["0.weight"]
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == "0.weight":
                metadata.storage_data[MetadataIndex(f"again.{i}", index.offset)] = info


def shrink(metadata: Metadata) -> None:
    metadata.state_dict_metadata["0.weight"].chunks = []


def negative(metadata: Metadata) -> None:
    metadata.state_dict_metadata["0.weight"].chunks[0].offsets = torch.Size([-1, 0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (claim("0.weight", relative_path="../stolen.pt"), "points outside its directory"),
        (claim("0.weight", relative_path="/etc/passwd"), "points outside its directory"),
        (claim("0.weight", offset=10**15), "cut short"),
        (claim("0.weight", length=2**60), "cut short"),
        (claim("0.weight", offset=-5), "cut short"),
        (claim("0.weight", offset=1), "damaged"),
        (claim("0.weight", transform_descriptors=["zstd"]), r"zstd.*dcp_to_torch"),
        (inflate, "claims a part"),
        (repeat, r"claims \d+ bytes"),
        (shrink, "a rank is missing"),
        (negative, "not a shape"),
        (lambda m: m.storage_data.clear(), "stored nowhere"),
        (lambda m: m.state_dict_metadata.update({"0.weight": BytesStorageMetadata()}), "unexpected|missing"),
    ],
)
def test_metadata_that_lies_is_refused(tmp_path, network, state, edit, message):
    folder = saved(tmp_path / "dcp", state)
    (tmp_path / "stolen.pt").write_bytes(next(folder.glob("*.distcp")).read_bytes())
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder, model=network)


def test_a_payload_in_a_shard_does_not_run(tmp_path, network, state, tripwire):
    folder = saved(tmp_path / "dcp", state)
    torch.save(tripwire, folder / "planted.distcp")
    size = (folder / "planted.distcp").stat().st_size
    change(folder, claim("0.weight", relative_path="planted.distcp", offset=0, length=size))
    with pytest.raises(CheckpointError, match="mkdir"):
        load(folder, model=network)


def test_a_part_of_another_shape_is_refused(tmp_path, network, state):
    folder = saved(tmp_path / "dcp", state)
    torch.save(torch.ones(40), folder / "other.distcp")
    size = (folder / "other.distcp").stat().st_size
    change(folder, claim("0.weight", relative_path="other.distcp", offset=0, length=size))
    with pytest.raises(CheckpointError, match=r"other\.distcp holds torch\.float32 \(40,\)"):
        load(folder, model=network)


def test_what_no_part_covers_is_not_a_number(tmp_path, state):
    folder = saved(tmp_path / "dcp", state)
    split_in_two(folder, "0.weight", state["0.weight"])

    def overlap(metadata: Metadata) -> None:  # two rows at 0 and two at 1 of four: the last stays empty
        stored = metadata.state_dict_metadata["0.weight"]
        for chunk in stored.chunks:
            chunk.sizes = torch.Size([2, 3])
        for rank in (0, 1):
            (folder / f"__{rank}_9.distcp").write_bytes(b"before" + _bytes(folder, torch.ones(2, 3)))

    change(folder, overlap)
    source = read_distributed(folder)
    found = source.read(source.content["0.weight"])
    assert math.isnan(float(found[3, 0]))
    assert torch.equal(found[:3], torch.ones(3, 3))


def test_shards_without_metadata(tmp_path, network, state):
    folder = saved(tmp_path / "dcp", state)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        load(folder, model=network)
