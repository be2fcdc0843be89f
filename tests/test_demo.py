from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from stabkit import demo
from stabkit.errors import StabkitError

pytest.importorskip("sklearn")


def shown(out, seed=0):
    text, progress = (Console(file=io.StringIO(), width=80) for _ in range(2))
    outcomes = demo.run(out, seed, text, progress)
    return outcomes, text.file.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, *shown(out)


def test_the_residual_network_trains_and_the_plain_one_does_not(done):
    _, (residual, plain), _ = done
    assert residual.accuracy > 0.9
    assert plain.accuracy < 0.3
    assert residual.report.verdict == "stable"
    assert plain.report.verdict == "vanishing"
    assert [step.method for step in residual.report.steps[:20]] == ["forward Euler"] * 20


def test_the_vanishing_is_that_of_the_sigmoid(done):
    _, (_, plain), _ = done
    # near zero sigmoid' is 1/4, and the default entries of W, of variance 1/(3 * 64), shrink a random vector by sqrt(3)
    assert plain.report.total_growth == pytest.approx(20 * np.log(0.25 / np.sqrt(3)), rel=0.1)


def test_checkpoints_reports_and_pictures_are_there(done):
    out, outcomes, text = done
    for outcome in outcomes:
        assert (
            load_file(out / f"{outcome.name}.safetensors").keys() == getattr(demo, outcome.name)().state_dict().keys()
        )
        names = {path.name for path in (out / outcome.name).iterdir()}
        assert names == {"report.html", "report.json", "region.png", "growth.png", "gradients.png"}
        assert f"--model stabkit.demo:{outcome.name}" in text
    assert np.load(out / "digits.npy").shape == (32, 64)
    assert (out / "contrast.png").exists()


def test_the_same_seed_prints_the_same_text_and_leaves_the_generator_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "BLOCKS", 2)
    before = torch.random.get_rng_state()
    texts = [shown(tmp_path, seed=3)[1] for _ in range(2)]
    assert texts[0] == texts[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(StabkitError, match=r'pip install "stabkit\[demo\]"'):
        shown(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_no_directory(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StabkitError, match="cannot be made"):
        shown(tmp_path / "out")
