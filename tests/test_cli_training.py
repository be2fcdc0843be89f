"""`stabkit analyze --loss --labels --optimizer --schedule`: names, files, and one line for an error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from stabkit.cli import app
from stabkit.cli.training import LOSSES, Training, named_loss
from stabkit.errors import StabkitError

NETWORK = """
import torch
from torch import nn

def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    np.save("x.npy", x)
    np.savetxt("y.csv", x.argmax(1) % 3, fmt="%d")
    np.save("y.npy", x.argmax(1) % 3)
    torch.save(torch.from_numpy(x.argmax(1) % 3), "y.pt")
    np.save("few.npy", np.zeros(5, int))
    np.save("many.npy", np.full(6, 7))
    (tmp_path / "words.csv").write_text("label\none\ntwo\n")
    return tmp_path


def run(*arguments):
    done = CliRunner().invoke(app, ["analyze", "net.py:net", "--input", "x.npy", "--spectrum", "none", *arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("labels", ["y.csv", "y.npy", "y.pt"])
def test_labels_of_every_kind_give_the_same_updates(folder, labels):
    code, output = run(
        "--loss", "cross_entropy", "--labels", labels, "--optimizer", "sgd:lr=0.1,momentum=0.9", "--json", "found.json"
    )  # fmt: skip
    assert code == 0, output
    found = json.loads((folder / "found.json").read_text())
    assert found["loss"] == "cross_entropy"
    assert found["training"]["method"] == "heavy_ball(momentum=0.9)"
    assert found["training"]["threshold"] == pytest.approx(38.0)
    assert found["training"]["loss"] == pytest.approx(1.11, abs=0.1)
    assert "Coming updates" in output


def test_a_rate_far_too_large_fails_where_that_is_asked_for():
    given = ("--loss", "cross_entropy", "--labels", "y.csv", "--optimizer", "sgd:lr=300", "--fail-on")
    code, output = run(*given, "unstable_update")
    assert code == 1, output
    assert "unstable_update" in output


def test_without_a_state_adam_has_the_critical_rate_and_says_why_no_threshold():
    code, output = run("--loss", "cross_entropy", "--labels", "y.csv", "--optimizer", "adam:lr=1e-3,betas=0.9:0.99")
    assert code == 0, output
    assert "Critical rate" in output
    assert "no threshold: optimizer Adam has made no update" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--loss", "crossentropy", "--labels", "y.csv"],
            f"{', '.join(LOSSES)}; did you mean cross_entropy?",
        ),
        (["--loss", "mse"], "--loss without --labels"),
        (["--labels", "y.csv"], "--labels without --loss"),
        (["--optimizer", "sgd:lr=1"], "--optimizer sgd:lr=1 without --loss"),
        (["--loss", "mse", "--labels", "y.csv"], "shape (6,) does not fit the output (6, 3): mse takes"),
        (["--loss", "nll", "--labels", "few.npy"], "--labels few.npy: shape (5,) does not fit the output (6, 3)"),
        (["--loss", "nll", "--labels", "many.npy"], "class numbers from 7 to 7, and the output has 3 classes, 0 to 2"),
        (["--loss", "mse", "--labels", "missing.csv"], "missing.csv"),
        (["--loss", "mse", "--labels", "words.csv"], "cannot be read as lines of numbers"),
        (["--optimizer", "sdg:lr=1"], "no optimizer of torch is called 'sdg'; there are"),
        (["--optimizer", "sgd:rate=1"], "'rate=1' is no setting of sgd; expected key=value with one of lr, momentum"),
        (["--optimizer", "sgd:lr=high"], "'lr=high' has no number"),
        (["--optimizer", "sgd"], "has no learning rate; write sgd:lr=0.1"),
        (["--loss", "nll", "--labels", "y.csv", "--optimizer", "sgd:lr=-1"], "Invalid learning rate: -1.0"),
        (["--loss", "nll", "--labels", "y.csv", "--stream"], "leave out --loss, --labels"),
        (["--optimizer", "sgd:lr=1", "--over-time"], "--over-time takes no"),
        (["--schedule", "step:step_size=3"], "--schedule step:step_size=3 without --optimizer"),
        (
            ["--optimizer", "sgd:lr=1", "--schedule", "step:step_size=3", "--stream"],
            "leave out --optimizer, --schedule",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, words):
    code, output = run(*arguments)
    assert code == 2
    assert words in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("spec", "present", "largest", "at"),
    [
        ("onecycle:max_lr=0.4,total_steps=100", 0.016, 0.4, 29),
        ("OneCycleLR:max_lr=0.4,total_steps=1e2,anneal_strategy=linear,pct_start=1,three_phase=false", 0.016, 0.4, 99),
        ("multistep:milestones=30:80,gamma=2", 0.1, 0.4, 80),
        ("multistep:milestones=30,gamma=2", 0.1, 0.2, 30),
        ("cosineannealinglr:T_max=100", 0.1, 0.1, 0),
        ("linear:start_factor=0.1,total_iters=20", 0.01, 0.1, 20),
        ("cyclic:base_lr=0.05,max_lr=0.3,step_size_up=6,cycle_momentum=true,mode=triangular2", 0.05, 0.3, 6),
        ("reducelronplateau:patience=3,mode=max", 0.1, 0.1, 0),
    ],
)
def test_a_schedule_sets_the_rate_and_the_largest_to_come(folder, spec, present, largest, at):
    given = ("--loss", "cross_entropy", "--labels", "y.csv", "--optimizer", "sgd:lr=0.1,momentum=0.9")
    code, output = run(*given, "--schedule", spec, "--json", "found.json")
    assert code == 0, output
    found = json.loads((folder / "found.json").read_text())["training"]
    assert found["learning_rate"] == pytest.approx(present)
    assert (found["largest_rate_ahead"], found["steps_to_largest_rate"]) == (pytest.approx(largest), at)
    assert ("the schedule climbs" if at else "the largest that the schedule has to come") in output


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("onecicle:max_lr=1", "no schedule of torch is called 'onecicle'; there are"),
        ("onecicle:max_lr=1", "did you mean onecycle"),
        ("step:size=3", "'size=3' is no setting of step; expected key=value with one of step_size, gamma"),
        ("step:size=3", "did you mean step_size?"),
        ("cosineannealing", "has no T_max; write cosineannealing:T_max=..."),
        ("cyclic:mode=exp_range", "has no base_lr and no max_lr"),
        ("onecycle:max_lr=0.1", "--schedule onecycle:max_lr=0.1: You must define either total_steps OR"),
        ("onecycle:max_lr=high,total_steps=9", "'max_lr=high' is no number"),
        ("onecycle:max_lr=1,total_steps=9,cycle_momentum=0.3", "'cycle_momentum=0.3' is neither true nor false"),
        ("onecycle:max_lr=1,total_steps=9,anneal_strategy=3", "'anneal_strategy=3' is no word; write for example cos"),
        ("onecycle:max_lr=1,total_steps=2.5", "Expected positive integer total_steps, but got 2.5"),
        ("cosineannealing:T_max=0", "scheduler CosineAnnealingLR fails in its next step: ZeroDivisionError"),
        ("lambda:lr_lambda=1", "LambdaLR takes functions or other schedules, which cannot be written here"),
        ("sequential", "stabkit.analyze(..., optimizer=optimizer, scheduler=scheduler)"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said_in_one_line(spec, words):
    given = ("--loss", "cross_entropy", "--labels", "y.csv", "--optimizer", "sgd:lr=0.1")
    code, output = run(*given, "--schedule", spec)
    assert code == 2
    assert words in output
    assert "--schedule" in output or "scheduler" in output
    assert "Traceback" not in output


def test_classes_in_the_second_or_in_the_last_dimension():
    torch.manual_seed(0)
    output, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    truth = functional.cross_entropy(output.flatten(0, 1), labels.flatten())
    assert torch.allclose(named_loss("cross_entropy", labels)(output), truth)
    assert torch.allclose(named_loss("cross_entropy", labels)({"logits": output}), truth)
    assert torch.allclose(named_loss("cross_entropy", labels)(output.movedim(-1, 1)), truth)
    assert torch.allclose(named_loss("cross_entropy", labels.double())(output), truth)
    ignored = labels.clone()
    ignored[0, 0] = -100
    assert named_loss("cross_entropy", ignored)(output).isfinite()


def test_numbers_but_for_dimensions_of_one():
    output = torch.randn(4, 1)
    y = torch.rand(4).double()
    assert torch.allclose(named_loss("mse", y)(output), functional.mse_loss(output, y[:, None].float()))
    truth = functional.binary_cross_entropy_with_logits(output, y[:, None].float())
    assert torch.allclose(named_loss("bce_with_logits", y)(output), truth)
    with pytest.raises(StabkitError, match="takes probabilities"):
        named_loss("bce_with_logits", y + 1)(output)


def test_a_loss_that_was_saved_will_do_for_an_optimizer():
    saved = torch.sum
    assert Training(optimizer="sgd:lr=1").loss_of(saved) is saved
