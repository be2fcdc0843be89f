from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from stabkit import checkpoints
from stabkit.cli import app
from stabkit.report import Report
from tests.report.synthetic import make_chain

NETWORKS = """
import sys
import torch
from torch import nn

def chain(gain=1.0, depth=12):
    print("the factory talks")
    layers = [nn.Linear(4, 4, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain)
    return nn.Sequential(*layers)

def raises():
    raise RuntimeError("no such width [bold]")

def leaves():
    sys.exit(0)

def not_a_number():
    network = chain()
    network[0].weight.data.fill_(float("nan"))
    return network

class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(2, 3)

class Whole(nn.Module):
    def forward(self, x):
        return x.argmax(-1)

class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        return torch.exp(1000 * torch.exp(100 * self.layer(x)))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "net.py").write_text(NETWORKS)
    return tmp_path


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    # typer leaves by SystemExit; anything else would have been a traceback
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def analyze(*arguments: str):
    return run("analyze", *arguments, "--input", "2x4")


def test_a_healthy_model(folder):
    result = analyze("net.py:chain", "--out", "a/b")
    assert result.exit_code == 0
    assert "net.py:chain: STABLE" in result.stdout
    assert sorted(path.name for path in (folder / "a" / "b").iterdir()) == [
        "gradients.png",
        "growth.png",
        "region.png",
        "report.html",
        "report.json",
    ]
    report = Report.load(folder / "a" / "b" / "report.json")
    # orthogonal layers keep the norm
    assert report.total_growth == pytest.approx(0, abs=1e-5)
    assert len(report.steps) == 12


def test_a_checkpoint_with_its_factory(folder):
    torch.save({"state_dict": {f"{i}.weight": 0.5 * torch.eye(4) for i in range(3)}}, "last.pt")
    result = analyze("last.pt", "--model", "net.py:chain", "--factory-args", '{"depth": 3}', "--json", "r.json")
    assert result.exit_code == 0
    assert Report.load("r.json").total_growth == pytest.approx(3 * -0.6931, abs=1e-3)


def test_json_on_standard_output_is_alone_there():
    result = analyze("net.py:chain", "--json", "-")
    data = json.loads(result.stdout)
    assert data["schema"] == "stabkit.report/1"
    assert len(data["steps"]) == 12
    assert "the factory talks" in result.stderr
    assert "STABLE" in result.stderr


@pytest.mark.parametrize(
    ("fail_on", "code"),
    [(None, 0), ("vanishing", 1), ("critical", 1), ("info", 1), ("exploding", 0), ("non-finite", 0)],
)
def test_fail_on(fail_on, code):
    options = [] if fail_on is None else ["--fail-on", fail_on]
    result = analyze("net.py:chain", "--factory-args", '{"gain": 0.5}', "--spectrum", "none", *options)
    assert "VANISHING" in result.stdout
    assert result.exit_code == code


def test_a_misspelt_fail_on_is_refused_before_the_work():
    result = analyze("nowhere.pt", "--fail-on", "explodng")
    assert result.exit_code == 2
    assert "did you mean exploding?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], "no file nowhere.pt"),
        (["cut.pt", "--model", "net.py:chain"], "cut.pt"),
        (["whole.pt", "--fail-on", "exploding"], "give the architecture: --model"),
        (["whole.pt", "--activation", "odd"], "--activation 'odd'; accepted: "),
        (["whole.pt", "cut.pt"], "add --over-time"),
        (["whole.pt", "--cache", "kept"], "--cache keeps"),
        (["net.py:raises"], "RuntimeError: no such width [bold]"),
        (["net.py:leaves"], "SystemExit"),
        (["net.py:absent"], "absent"),
        (["net.py:Constant"], "does not depend"),
        (["net.py:Whole"], "no floating-point tensor"),
        (["net.py:not_a_number"], "NaN or infinity in the weights 0.weight"),
        (["net.py:Overflows"], "not finite"),
        (["net.py:chain", "--input", "2x5"], "(2, 5)"),
        (["net.py:chain", "--spectrum", "odd"], "spectrum='odd'"),
        (["net.py:chain", "--depth", "odd,*.odder"], "['odd', '*.odder'] picks no module"),
        (["net.py:chain", "--weights", "odd"], "'raw' or 'ema'"),
        (["net.py:chain", "--factory-args", "[1]"], "--factory-args '[1]' is a list"),
        (["net.py:chain", "--factory-args", "{"], "is not JSON"),
        (["net.py:chain", "--factory-args", '{"odd": 1}'], "odd"),
        (["net.py:chain", "--out", "net.py"], "--out net.py is a file"),
        (["net.py:chain", "--json", "no/r.json"], "the directory does not exist"),
    ],
)
def test_what_cannot_run_gets_one_message_and_code_2(folder, arguments, message):
    torch.save(torch.nn.Linear(4, 4).state_dict(), "whole.pt")
    whole = (folder / "whole.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    before = sorted(folder.iterdir())
    result = run("analyze", "--input", "2x4", *arguments, *([] if "--out" in arguments else ["--out", "out"]))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    if "Overflows" not in arguments[0]:
        assert result.stdout == "" or result.stdout.endswith("; eval mode\n")  # what was loaded, and no result
        assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


@pytest.fixture
def epochs(folder):
    for epoch, gain in ((9, 1.0), (10, 0.5)):
        weights = {f"{i}.weight": gain * torch.eye(4) for i in range(12)}
        torch.save({"model": weights, "epoch": epoch}, folder / f"epoch{epoch}.pt")
    return ["epoch10.pt", "epoch9.pt", "--model", "net.py:chain", "--input", "2x4"]


def test_compare_and_resume(folder, epochs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("compare", *epochs, "--out", "out")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()[1:3]]
    assert [(line[0], line[1], line[2]) for line in lines] == [
        ("epoch10.pt", "10", "vanishing"),
        ("epoch9.pt", "9", "stable"),
    ]
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        ".stabkit",
        "comparison.csv",
        "comparison.html",
        "comparison.json",
        "comparison.png",
    ]
    again = run("compare", *epochs, "--out", "out")
    assert "2 of 2 taken from the cache" in again.stdout


def test_over_time_is_in_the_order_of_training(epochs):
    result = run("analyze", *epochs, "--over-time", "--json", "-", "--fail-on", "vanishing")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert [snapshot["step"] for snapshot in data["snapshots"]] == [9, 10]
    assert "between 9 and 10: stable became vanishing" in data["changes"][0]


def test_a_checkpoint_that_cannot_be_read_is_an_exit_code_after_the_others(folder, epochs):
    (folder / "epoch11.pt").write_bytes(b"PK")
    result = run("analyze", "epoch11.pt", *epochs, "--over-time")
    assert result.exit_code == 2
    assert "stable became vanishing" in result.stdout
    assert "epoch11.pt" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["epoch9.pt"], "at least two"), (["no1.pt", "no2.pt", "--model", "net.py:chain"], "none of 2 checkpoints")],
)
def test_what_cannot_be_compared(epochs, arguments, message):
    result = run("compare", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_weights_alone(folder):
    torch.save({"model": torch.nn.LSTM(3, 4).state_dict(), "epoch": 1}, folder / "lstm.pt")
    result = run("analyze", "lstm.pt", "--out", "out", "--json", "w.json")
    assert result.exit_code == 0
    assert "WEIGHTS ONLY" in result.stdout
    assert "weaker statement" in result.stdout
    assert "give the architecture: --model" in " ".join(result.stdout.split())
    data = json.loads((folder / "w.json").read_text())
    assert data == json.loads((folder / "out" / "weights.json").read_text())
    assert [m["kind"] for m in data["matrices"]] == ["recurrent", "matrix"]
    torch.save({"w.weight": torch.full((2, 2), float("nan"))}, folder / "bad.pt")
    assert run("analyze", "bad.pt").exit_code == 0
    assert run("analyze", "bad.pt", "--fail-on", "non-finite").exit_code == 1


def test_debug_shows_the_traceback():
    result = analyze("net.py:raises", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("odd"), 2, "unexpected ZeroDivisionError: odd; run again with --debug"),
        (SystemExit(0), 2, "left the program"),
        (ValueError("\x1b[2J[red]"), 2, "\\x1b[2J[red]"),
    ],
)
def test_anything_else_is_one_line_and_a_code(monkeypatch, error, code, message):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints, "load", load)
    result = analyze("net.py:chain")
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["region", "growth", "gradients", "overview"])
def test_plot_draws_a_saved_report(folder, kind):
    make_chain([0.1, 0.2]).save("report.json")
    result = run("plot", "report.json", kind)
    assert result.exit_code == 0
    assert (folder / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report.json", "odd"], "no plot is called 'odd'; there are: region, "),
        (["nowhere.json", "region"], "nowhere.json: no such file"),
        (["net.py", "region"], "not a whole JSON file"),
        (["report.json", "region", "--out", "r.txt"], "unknown suffix '.txt'"),
        (["report.json", "region", "--out", "no/r.png"], "does not exist"),
    ],
)
def test_plot_says_what_it_cannot_draw(arguments, message):
    make_chain([0.1]).save("report.json")
    result = run("plot", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_methods(folder):
    assert "dopri5" in run("methods").stdout
    result = run("methods", "rk4", "--plot", "rk4.svg")
    assert result.exit_code == 0
    assert "1/6" in result.stdout
    assert b"<svg" in (folder / "rk4.svg").read_bytes()


def test_methods_that_do_not_exist():
    result = run("methods", "rk4x")
    assert result.exit_code == 2
    assert "did you mean rk4" in result.stderr
    assert "needs the NAME" in run("methods", "--plot", "x.png").stderr


@pytest.mark.parametrize("option", ["--help", "--version", "analyze --help"])
def test_help_and_version_import_nothing_heavy(option):
    code = (
        "import sys\nfrom stabkit.cli import main\nsys.argv = ['stabkit', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert not left.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *option.split()], check=True, capture_output=True)


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "stabkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("stabkit 0.")


@pytest.mark.parametrize("command", ["methods", "analyze many.pt"])
def test_a_closed_pipe_is_quiet(folder, command):
    torch.save({f"layer_with_a_long_name_{i}.weight": torch.eye(2) for i in range(2000)}, folder / "many.pt")
    pipe = f"{sys.executable} -m stabkit {command} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] in ("0", "141")
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("command", [["methods"], ["--help"], ["--version"]])
def test_a_full_output_device_gives_one_line(command):
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-m", "stabkit", *command], stdout=full, stderr=-1, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_out_of_memory_gives_one_line(monkeypatch, capfd):
    from stabkit.cli.console import guarded

    monkeypatch.setitem(sys.modules, "rich.text", None)  # no room for what is not loaded yet
    with pytest.raises(typer.Exit), guarded(debug=False):
        raise MemoryError
    assert capfd.readouterr().err.startswith("error: out of memory;")
