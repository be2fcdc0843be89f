from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import stabkit
from stabkit import checkpoints
from stabkit.cli import app
from stabkit.cli.execution import analyzed, chosen_device, streamed
from stabkit.cli.options import Effort, Recipe
from stabkit.cli.plan import plan
from stabkit.errors import StabkitError

NETWORK = """
from torch import nn

def chain():
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(6)])
"""


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "networks.py"
    path.write_text(NETWORK)
    return f"{path}:chain"


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(plan)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def recipe() -> Recipe:
    return Recipe(input="8x4")


def test_the_price_is_printed_and_written(run, network, tmp_path):
    done = run(network, "--input", "8x4", "--budget", "10m", "--memory", "64G", "--json", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    assert "6 steps, 8 samples" in done.output
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["samples"] == 8


def test_a_budget_that_nothing_keeps_is_exit_code_1(run, network):
    done = run(network, "--input", "8x4", "--budget", "0.000001s", "--json", "-")
    assert done.exit_code == 1
    assert "DOES NOT FIT" in done.stderr
    assert json.loads(done.stdout)["fits"] is False


def test_a_misspelt_budget_is_exit_code_2(run, network):
    done = run(network, "--budget", "soon")
    assert done.exit_code == 2
    assert "90s, 10m" in done.output


def test_what_a_budget_leaves_is_analysed(network):
    loaded = checkpoints.load(network, input="8x4")
    report = stabkit.analyze(loaded.model, *loaded.inputs, budget="1h", memory="64G")
    assert len(report.steps) == 6
    assert not any("left out" in note for note in report.notes)
    with pytest.raises(StabkitError, match=r"no analysis .* keeps budget=1e-06; the least that one takes"):
        stabkit.analyze(loaded.model, *loaded.inputs, budget=1e-6)


def test_the_price_alone(network):
    loaded = checkpoints.load(network, input="8x4")
    found = stabkit.analyze(loaded.model, *loaded.inputs, probes=2, spectrum="none", plan_only=True)
    assert (found.steps, found.settings.probes, found.settings.samples) == (6, 2, 8)
    assert "peak memory" in str(found)


def test_a_report_within_a_budget_says_what_was_left_out(network, monkeypatch):
    loaded = checkpoints.load(network, input="8x4")
    whole = analyzed(loaded, recipe(), Effort())
    assert len(whole.steps) == 6
    assert not any("left out" in note for note in whole.notes)
    monkeypatch.setattr("stabkit.planning.budgeting._within", lambda price, *_: price.products < 80)
    less = analyzed(loaded, recipe(), Effort(budget="10m"))
    assert any("left out to keep the budget" in note for note in less.notes)


def test_a_directory_is_streamed(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found, again = (streamed(tmp_path, Recipe(input="tokens:2x4"), Effort(), out=tmp_path / "out") for _ in range(2))
    assert found is not None
    assert again is not None
    assert found.log_growth.shape == (2, 2)
    assert again.reused == 4


def test_a_device_that_is_not_there_is_named():
    assert chosen_device("cpu") == torch.device("cpu")
    for name in ("warp", "meta", "cuda:99"):
        with pytest.raises(StabkitError, match=f"--device '{name}'"):
            chosen_device(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stream", "--model", "x:y", "--budget", "1m"], "leave out --model, --budget"),
        (["--over-time", "--stream"], "--over-time takes no"),
        (["--budget", "soon"], "90s, 10m"),
        (["--memory", "0G"], "512M, 8G"),
        (["--device", "warp"], "--device 'warp' cannot be used"),
    ],
)
def test_options_that_make_no_sense_are_named(network, arguments, said):
    done = CliRunner().invoke(app, ["analyze", network, "--input", "2x4", *arguments])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
