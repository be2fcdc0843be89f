"""`stabkit plot` reaches every picture, from a report, from the records of a monitor, and from a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import stabkit
from stabkit import plotting
from stabkit.cli import app
from stabkit.cli.plot import KINDS
from stabkit.pictures import PICTURES, default_picture
from tests.report.synthetic import make_chain, make_training

PLANAR = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(2, 2)
    def forward(self, x):
        return x + 0.3 * torch.tanh(self.f(x))

def planar():
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(3)])
"""

EXPONENTS = ("lyapunov", "convergence", "sums")  # not in a report made by hand


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    report = make_chain([0.5, -0.2], attribution={"spectral": 0.1})
    replace(report, training=make_training()).save(tmp_path / "report.json")
    report.save(tmp_path / "bare.json")
    block = {"name": "0", "growth": 0.1}
    lines = [json.dumps({"step": i, "findings": [], "blocks": [block]}) for i in range(3)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "planar.py").write_text(PLANAR)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plot", *arguments])
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written(folder: Path, kind: str):
    in_report = "Report" in PICTURES[kind] and kind not in EXPONENTS
    source = ["report.json"] if in_report else ["records.jsonl"] if kind == "training" else []
    code, output = run(*(source or ["planar.py:planar"]), kind, *([] if source else ["--input", "1x2"]))
    assert code == 0, output
    assert (folder / f"{kind}.png").stat().st_size > 1000


@pytest.mark.parametrize("source", [".", "records.jsonl"])
def test_the_growth_of_a_run_is_the_heat_map_of_its_training(folder: Path, source: str):
    assert run(source, "growth")[0] == run(source, "training", "--out", "other.png")[0] == 0
    assert (folder / "growth.png").read_bytes() == (folder / "other.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report.json", "regoin"], "did you mean region?"),
        (["missing.json", "region"], "no such file"),
        (["report.json", "training"], "no readable records"),
        (["bare.json", "update"], "the report has no optimizer; analyse with loss= and optimizer="),
        (["planar.py:planar", "updates", "--input", "1x2"], "the report has no optimizer"),
        (["records.jsonl", "region"], "of which growth and training are drawn"),
        (["records.jsonl", "growth", "--quantity", "groth"], "did you mean growth?"),
        (["planar.py:planar", "field", "--input", "1x2", "--step", "9"], "there is no such step"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(folder: Path, arguments: list[str], words: str):
    code, output = run(*arguments)
    assert code == 2
    assert words in " ".join(output.split())


@pytest.mark.parametrize("kind", ["spectrum", "lyapunov", "convergence", "sums"])
def test_a_report_has_its_spectra_and_exponents(folder: Path, kind: str):
    code, output = run("planar.py:planar", "growth", "--input", "3x2")  # a model is analysed first
    assert code == 0, output
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    stabkit.analyze(model, torch.randn(3, 2)).save(folder / "whole.json")
    code, output = run("whole.json", kind, "--out", "drawn.svg")
    assert code == 0, output
    assert (folder / "drawn.svg").read_text().startswith("<?xml")


def test_what_a_report_does_not_hold_is_said_with_the_way_to_it(folder: Path):
    code, output = run("report.json", "pseudospectra")
    assert code == 2
    assert "stabkit plot MODEL pseudospectra" in " ".join(output.split())


def test_a_recurrent_module_is_followed_over_time(folder: Path):
    (folder / "net.py").write_text("from torch import nn\n\ndef net():\n    return nn.GRU(3, 4)\n")
    for kind in ("portrait", "lyapunov"):
        code, output = run("net.py:net", kind, "--input", "20x2x3")
        assert code == 0, output


def test_the_flow_map_can_move(folder: Path):
    code, output = run("planar.py:planar", "flow-map", "--input", "1x2", "--out", "moving.gif")
    assert code == 0, output
    assert (folder / "moving.gif").read_bytes()[:3] == b"GIF"
    code, output = run("planar.py:planar", "field", "--input", "1x2", "--out", "moving.gif")
    assert code == 2
    assert "only flow-map can be a .gif" in " ".join(output.split())


def test_every_plot_is_in_the_table_and_every_entry_is_a_plot():
    named = {function for draws in PICTURES.values() for function in draws.values()}
    no_picture_of_a_result = {"animate_flow_map", "compare", "figure_of", "grid_points", "render"}
    assert named - {"total_growth", "step_growth", "margin"} <= set(plotting.__all__)
    assert set(plotting.__all__) - no_picture_of_a_result == named


@pytest.mark.parametrize("shown", ["Report", "GradientProfile", "Attribution", "LyapunovSpectrum", "Comparison"])
def test_a_result_is_drawn_by_its_first_picture(shown: str):
    assert default_picture(type(shown, (), {})) == next(d[shown] for d in PICTURES.values() if shown in d)
