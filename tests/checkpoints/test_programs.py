from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.analysis import analyze
from stabkit.checkpoints import load
from stabkit.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch deprecates its own formats


@pytest.fixture
def files(tmp_path, network):
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    x = torch.randn(2, 3)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
    torch.jit.script(module).save(str(tmp_path / "scripted.pt"))
    torch.jit.trace(module, x).save(str(tmp_path / "traced.pt"))
    return module, x, tmp_path


@pytest.mark.parametrize(
    ("name", "flag"),
    [("program.pt2", "allow_export"), ("scripted.pt", "allow_torchscript"), ("traced.pt", "allow_torchscript")],
)
def test_a_program_is_loaded_only_with_its_own_flag(files, name, flag):
    module, x, folder = files
    other = {"allow_export": "allow_torchscript", "allow_torchscript": "allow_export"}[flag]
    shown = "--" + flag.replace("_", "-")
    for options in ({}, {other: True}, {"trust_pickle": True}):
        with pytest.raises(CheckpointError, match=f"Nothing was run.*{shown}"):
            load(folder / name, **options)
    loaded = load(folder / name, input="2x3", **{flag: True})
    assert torch.allclose(loaded.model(x), module(x))
    assert shown in loaded.description
    growths = [
        sum(step.growth for step in analyze(m, *loaded.inputs, spectrum="none").steps) for m in (loaded.model, module)
    ]
    assert growths[0] == pytest.approx(growths[1], abs=1e-5)


def test_the_example_of_an_exported_program_is_its_input(files):
    _, x, folder = files
    loaded = load(folder / "program.pt2", allow_export=True)
    assert torch.equal(loaded.inputs[0], x)
    assert "saved with the program" in loaded.description


@pytest.mark.parametrize(("name", "flag"), [("program.pt2", "allow_export"), ("traced.pt", "allow_torchscript")])
def test_the_weights_of_a_program_fill_an_architecture(files, name, flag):
    module, _, folder = files
    build = lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))  # noqa: E731
    loaded = load(folder / name, model=build, **{flag: True})
    assert torch.equal(loaded.model[0].weight, module[0].weight)
    with pytest.raises(CheckpointError, match=r"unknown to the model|another shape"):
        load(folder / name, model=lambda: nn.Linear(3, 4), **{flag: True})


@pytest.mark.parametrize(("name", "flag"), [("program.pt2", "allow_export"), ("scripted.pt", "allow_torchscript")])
def test_a_damaged_program_is_said_to_be_so(files, name, flag):
    _, _, folder = files
    content = bytearray((folder / name).read_bytes())
    middle = content.index(b"graph_module" if name == "program.pt2" else b"torch")
    content[middle : middle + 3] = b"???"
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(folder / name, input="2x3", **{flag: True})
