"""`stabkit analyze --loss --labels --optimizer`: losses by name, labels from files, and one line for what is wrong."""

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
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, words):
    code, output = run(*arguments)
    assert code == 2
    assert words in output
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
