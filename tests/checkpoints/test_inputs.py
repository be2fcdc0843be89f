from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.checkpoints.inputs import make_inputs
from stabkit.checkpoints.model_names import build_model
from stabkit.errors import CheckpointError


def test_a_shape_gives_seeded_normal_values_in_the_dtype_of_the_model():
    model = nn.Linear(50, 2).double()
    before = torch.get_rng_state()
    one, same, other = (make_inputs(model, "40x50", seed=s).args[0] for s in (0, 0, 1))
    assert one.shape == (40, 50)
    assert one.dtype == torch.float64
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert abs(float(one.mean())) < 0.1
    assert abs(float(one.std()) - 1) < 0.1
    assert torch.equal(torch.get_rng_state(), before)


def test_several_shapes_are_several_inputs():
    made = make_inputs(nn.Bilinear(2, 3, 4), "5x2, 5x3")
    assert [t.shape for t in made.args] == [(5, 2), (5, 3)]


def test_tokens_stay_below_the_vocabulary():
    model = nn.ModuleDict({"position": nn.Embedding(1000, 4), "word": nn.Embedding(7, 4)})
    made = make_inputs(model, "tokens:4x100")
    assert set(made.args[0].flatten().tolist()) == set(range(7))
    assert made.args[0].dtype == torch.int64
    assert "below 7" in made.how
    with pytest.raises(CheckpointError, match=r"no nn\.Embedding"):
        make_inputs(nn.Linear(2, 2), "tokens:1x8")


@pytest.mark.parametrize(
    "bad", ["1x0x3", "tokens:", "tokens:ax8", "3,x", "1 x 3", "", "nothing.xyz", "99999999x99999999x999"]
)
def test_a_shape_that_is_none(bad):
    with pytest.raises(CheckpointError, match="input"):
        make_inputs(nn.Linear(2, 2), bad)


def test_tensors_are_taken_as_they_are():
    x = torch.ones(2, 2, dtype=torch.float16)
    assert make_inputs(nn.Linear(2, 2), x).args[0] is x
    assert make_inputs(nn.Linear(2, 2), (x, x)).args == (x, x)
    for bad in (("a",), (), 3):
        with pytest.raises(CheckpointError, match="input is a"):
            make_inputs(nn.Linear(2, 2), bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Tanh()), (1, 6)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)), (1, 1, 28, 28)),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 3)), (1, 3, 32, 32)),
        (nn.Conv1d(4, 2, 3), (1, 4, 64)),
        (nn.LSTM(5, 3), (16, 1, 5)),
        (nn.GRU(5, 3, batch_first=True), (1, 16, 5)),
        (nn.Embedding(9, 3), (1, 16)),
        (build_model("torchvision:mobilenet_v3_small")[0], (1, 3, 64, 64)),
    ],
)
def test_the_first_layer_tells_the_shape(model, shape):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = make_inputs(model)
    assert made.args[0].shape == shape
    assert "inferred" in made.how
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("torchvision:squeezenet1_1", (1, 3, 224, 224)),
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("timm:test_vit", (1, 3, 160, 160)),
    ],
)
def test_a_library_tells_the_shape(name, shape):
    model, _ = build_model(name)
    assert make_inputs(model, name=name).args[0].shape == shape


def test_what_cannot_be_inferred_names_the_flag():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            raise RuntimeError("three inputs, please")

    for model, why in ((Odd(), "three inputs, please"), (nn.Identity(), "no linear")):
        with pytest.raises(CheckpointError, match=rf"(?s){why}.*--input"):
            make_inputs(model)


def test_an_input_file_follows_the_dtype_of_the_model(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    made = make_inputs(nn.Linear(3, 1), str(tmp_path / "x.npy"))
    assert made.args[0].dtype == torch.float32
    assert made.args[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "2x3" in made.how


def test_names_in_a_file_become_keyword_arguments(tmp_path):
    model = nn.Bilinear(2, 3, 4)
    torch.save({"input2": torch.ones(5, 3), "input1": torch.ones(5, 2)}, tmp_path / "x.pt")
    made = make_inputs(model, tmp_path / "x.pt")
    assert made.args == ()
    assert model(**made.kwargs).shape == (5, 4)
    torch.save({"left": torch.ones(5, 3), "right": torch.ones(5, 2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds left, right, but the model takes input1, input2"):
        make_inputs(model, tmp_path / "x.pt")
