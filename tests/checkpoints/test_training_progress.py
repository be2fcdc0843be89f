from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stabkit.checkpoints.files import read_file
from stabkit.checkpoints.training_progress import natural_order, step_in_name, training_step


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3, "global_step": 40}, ("global_step", 40)),
        ({"epoch": torch.tensor(3)}, ("epoch", 3)),
        ({"step": np.int64(7)}, ("step", 7)),
        ({"iter_num": np.float32(2.5)}, ("iter_num", 2.5)),
        ({"args": argparse.Namespace(epoch=4, lr=0.1)}, ("epoch", 4)),
        ({"meta": {"iter": 9}}, ("iter", 9)),
        ({"epoch": "three"}, None),
        ({"epoch": True, "step": torch.ones(2)}, None),
        ({"epoch": float("nan")}, None),
        ({}, None),
    ],
)
def test_the_count_in_a_training_dict(tmp_path, content, expected):
    torch.save(content, tmp_path / "run.pt")
    assert training_step(read_file(tmp_path / "run.pt").content) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epoch=3-step=1200.ckpt", ("step", 1200)),
        ("step-100_loss-0.25.ckpt", ("step", 100)),
        ("resnet50_epoch12.pth", ("epoch", 12)),
        ("checkpoint-5000", ("checkpoint", 5000)),
        ("ckpt_iter_30.pt", ("iter", 30)),
        ("0007.safetensors", ("file name", 7)),
        ("best.pt", None),
    ],
)
def test_the_count_in_a_file_name(name, expected):
    assert step_in_name(Path("run1") / name) == expected


def test_numbers_sort_as_numbers():
    names = [f"layer.{i}.weight" for i in range(120)]
    shuffled = names[:]
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural_order) == names
    # more digits than int() takes, digits of another kind, a part that is empty
    assert sorted(["9" * 5000, "10", "²", "", "٣"], key=natural_order)[0] == ""
