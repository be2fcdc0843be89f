"""The capsule format: what is written comes back, and a damaged directory is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.checkpoints.capsule_loading import load_capsule
from stabkit.checkpoints.capsules import RecordedCall, is_capsule, read_capsule, write_capsule
from stabkit.checkpoints.randomness import as_tensors, random_state, restore_random
from stabkit.errors import CheckpointError

MANIFEST = {
    "step": 7,
    "reason": "asked for",
    "complete": True,
    "training": False,
    "unlike": [],
    "autocast": {},
    "scale": 1.0,
    "processes": 1,
    "model_factory": None,
    "record": {},
}


def written(path, model, call, **changes):
    manifest = {**MANIFEST, **changes}
    write_capsule(path, weights=model.state_dict(), calls=[call], manifest=manifest, records=['{"step": 7}'])
    return path


def make_call(**changes):
    given = {"args": (torch.ones(2, 3),), "kwargs": {}, "random": as_tensors(random_state()), **changes}
    return RecordedCall(**given)


def test_arguments_come_back_in_their_containers(tmp_path):
    array = np.arange(3)
    args = (torch.arange(4).view(2, 2).T, [1, "two", None, (2.5, {"deep": torch.ones(1)})], array)
    path = written(tmp_path / "a" / "c", nn.Linear(3, 2), make_call(args=args, kwargs={"mask": torch.tensor([True])}))
    (call,) = read_capsule(path).calls
    assert torch.equal(call.args[0], args[0])
    assert call.args[1][:3] == [1, "two", None]
    assert call.args[1][3][0] == 2.5
    assert torch.equal(call.args[1][3][1]["deep"], torch.ones(1))
    assert isinstance(call.args[1][3], tuple)
    assert np.array_equal(call.args[2], array)
    assert call.kwargs["mask"].dtype == torch.bool


def test_weights_that_share_memory_are_written_apart(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    path = written(tmp_path / "c", model, make_call())
    loaded = load_capsule(path, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert torch.equal(loaded.module[1].weight, model[0].weight)


def test_a_random_state_comes_back_for_every_generator(tmp_path):
    random.gauss(0, 1)
    torch.randn(3)
    np.random.standard_normal()  # noqa: NPY002
    path = written(tmp_path / "c", nn.Linear(3, 2), make_call())

    def draw():
        return torch.rand(2).tolist(), random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()  # noqa: NPY002

    first = draw()
    restore_random(read_capsule(path).calls[0].random)
    assert draw() == first


def test_modes_are_those_of_the_step(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    path = written(tmp_path / "c", model, make_call(), training=True, unlike=["1"])
    loaded = load_capsule(path, lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    assert loaded.module.training
    assert not loaded.module[1].training
    assert loaded.loss is None


def test_a_model_must_be_named_and_fit(tmp_path):
    path = written(tmp_path / "c", nn.Linear(3, 2), make_call())
    with pytest.raises(CheckpointError, match="does not say how to build its model; give --model"):
        load_capsule(path)
    with pytest.raises(CheckpointError, match="weight"):
        load_capsule(path, lambda: nn.Linear(4, 2))


def test_a_factory_that_a_capsule_names_is_not_run(tmp_path):
    payload = tmp_path / "payload.py"
    payload.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef make(): ...\n")
    path = written(tmp_path / "c", nn.Linear(3, 2), make_call(), model_factory=f"{payload}:make")
    with pytest.raises(CheckpointError, match=rf"not run because a file says so.*--model {payload}:make"):
        load_capsule(path)
    assert not (tmp_path / "ran").exists()
    path = written(tmp_path / "d", nn.Linear(3, 2), make_call(), model_factory="timm:linear")
    with pytest.raises(CheckpointError, match="timm"):  # a library's models are looked up
        load_capsule(path)


@pytest.mark.parametrize("damage", ["missing", "not_json", "other_format", "field", "step", "batch"])
def test_a_damaged_capsule_is_refused(tmp_path, damage):
    path = written(tmp_path / "c", nn.Linear(3, 2), make_call())
    manifest = path / "capsule.json"
    content = json.loads(manifest.read_text())
    if damage == "missing":
        manifest.unlink()
        assert not is_capsule(path)
    elif damage == "not_json":
        manifest.write_text("{")
    elif damage == "other_format":
        manifest.write_text(json.dumps({**content, "format": "stabkit.capsule/99"}))
    elif damage == "step":
        manifest.write_text(json.dumps({**content, "step": math.inf}))
    elif damage == "field":
        manifest.write_text(json.dumps({**content, "calls": [{"args": [{"tensor": "nowhere"}]}]}))
    else:
        (path / "batch.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="capsule"):
        read_capsule(path)


@pytest.mark.parametrize("damage", ["weights", "random", "batch", "modes"])
def test_a_damaged_part_is_an_error(tmp_path, damage):
    call = make_call()
    if damage == "random":
        call.random["numpy"][0] = 2**40
    if damage == "batch":
        call = replace(call, args=(torch.ones(2, 5),))
    path = written(tmp_path / "c", nn.Linear(3, 2), call, unlike=["nowhere"] if damage == "modes" else [])
    if damage == "weights":
        (path / "weights.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"safetensors|random state is damaged|does not run|no module 'nowhere'"):
        load_capsule(path, lambda: nn.Linear(3, 2))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    class Unwritable:
        def __iter__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_capsule(tmp_path / "c", weights={}, calls=[make_call()], manifest=MANIFEST, records=Unwritable())
    assert list(tmp_path.iterdir()) == []
