from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.checkpoints.model_names import build_model, is_model_name
from stabkit.errors import CheckpointError

FACTORY = """
import random, numpy, torch
import neighbour
def build(width=2):
    return torch.nn.Linear(width, neighbour.SIZE)
class Net(torch.nn.Linear):
    def __init__(self): super().__init__(3, 3)
    @classmethod
    def small(cls): return cls()
def raises(): raise ValueError("no such thing")
def text(): return "not a module"
def leaves(): raise SystemExit(2)
ready = torch.nn.Identity()
number = 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(FACTORY)
    (tmp_path / "neighbour.py").write_text("SIZE = 5\n")
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "absent.py").write_text("import a_package_that_is_not_there\n")
    yield str(tmp_path / "nets.py")
    for name in ("neighbour", "nets"):
        sys.modules.pop(name, None)


def test_a_file_and_its_neighbours(factory, tmp_path):
    path = list(sys.path)
    assert build_model(f"{factory}:build", factory_args={"width": 7})[0].weight.shape == (5, 7)
    assert build_model(f"{factory}:Net")[0].in_features == 3
    assert build_model(f"{factory}:Net.small")[0].in_features == 3
    assert isinstance(build_model(f"{factory}:ready")[0], nn.Identity)
    assert sys.path == path
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_module_path_is_found_in_the_current_folder(factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_model("nets:build")[0].out_features == 5


@pytest.mark.parametrize(
    ("attribute", "arguments", "message"),
    [
        ("raises", {}, r"raised ValueError: no such thing \(.*nets\.py:10\)"),
        ("text", {}, "returned str; expected a torch"),
        ("leaves", {}, "raised SystemExit"),
        ("number", {}, "is a int; expected a function"),
        ("biuld", {}, "did you mean build"),
        ("build", {"widht": 3}, r"unexpected keyword argument 'widht'.*\(width=2\).*--factory-args"),
        ("ready", {"a": 1}, "already built"),
    ],
)
def test_a_factory_that_fails_says_where(factory, attribute, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        build_model(f"{factory}:{attribute}", factory_args=arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.py:build", r"no file .*net\.py; did you mean nets\.py"),
        ("broken.py:build", r"importing .*broken\.py raised SyntaxError.*line 1"),
        ("absent.py:build", "No module named 'a_package_that_is_not_there'"),
        ("no_such_package.mod:build", "No module named 'no_such_package'"),
        ("some file:build", "neither a module path"),
        ("torchvision:resnet81", "did you mean resnet18"),
        ("timm:resnet_18", "did you mean resnet18"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no model"),
        ("nonsense", "is not a model name"),
    ],
)
def test_a_name_that_leads_nowhere(factory, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        build_model(name)


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_vit"])
def test_random_weights_follow_the_seed_and_the_generators_stay(name):
    torch.manual_seed(5)
    before = torch.get_rng_state(), _numpy_state(), random.getstate()
    one, same, other = (build_model(name, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (_numpy_state(), random.getstate()) == before[1:]


def _numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002 - the global generator is what must stay


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("timm:resnet10t", {"pretrained": True}), ("torchvision:resnet18", {"weights": "DEFAULT"})],
)
def test_downloads_are_refused(name, arguments):
    with pytest.raises(CheckpointError, match="without downloads"):
        build_model(name, factory_args=arguments)


def test_a_detection_model_does_not_fetch_its_backbone():
    model, _ = build_model("torchvision:ssdlite320_mobilenet_v3_large", factory_args={"num_classes": 3})
    assert isinstance(model, nn.Module)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CheckpointError, match=r'pip install "stabkit\[models\]"'):
        build_model("timm:resnet10t")


def test_a_model_of_another_type():
    with pytest.raises(CheckpointError, match="model is a int; expected a name"):
        build_model(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="returned NoneType"):
        build_model(lambda: None)
    module = nn.Linear(2, 2)
    assert build_model(module)[0] is module


def test_paths_are_not_model_names():
    assert [is_model_name(t) for t in ("a/b.py:f", "timm:x", "C:\\run\\last.pt", "last.ckpt")] == [
        True,
        True,
        False,
        False,
    ]


def test_the_optional_packages_are_imported_only_when_used():
    packages = ("torchvision", "timm", "transformers", "PIL")
    code = f"import sys, stabkit.checkpoints; print([m for m in {packages} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
