from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabkit import checkpoints
from stabkit.cli.execution import analyzed
from stabkit.cli.options import Effort, Recipe

ROOT = Path(__file__).parent.parent.parent
NETWORK = """
import os
from torch import nn

class Dies(nn.Tanh):
    def forward(self, x):
        if os.environ.get("RANK") == "1":
            os._exit(7)
        return super().forward(x)

def chain(last=nn.Tanh):
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)], last())

def dying():
    return chain(Dies)
"""


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "networks.py").write_text(NETWORK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "stabkit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_torchrun_gives_one_report_that_is_the_plain_one(tmp_path):
    source = f"{tmp_path / 'networks.py'}:chain"
    done = torchrun(tmp_path, "analyze", source, "--input", "4x4", "--json", "-", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    recipe = Recipe(input="4x4")
    alone = analyzed(checkpoints.load(source, input="4x4"), recipe, Effort()).to_dict()
    assert told.pop("seconds") > 0
    assert alone.pop("seconds") > 0
    for mine, other in zip(told["steps"], alone["steps"], strict=True):
        assert mine == other
    assert told == alone
    assert (tmp_path / "out" / "report.html").exists()


def test_a_rank_that_dies_ends_the_run_with_a_message(tmp_path):
    source = f"{tmp_path / 'networks.py'}:dying"
    done = torchrun(tmp_path, "analyze", source, "--input", "4x4")
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr
    assert "another rank" in done.stderr or "another of the 2 ranks is gone" in done.stderr, done.stderr


_TELLING = """
import os, signal, sys
import stabkit.report.terminal as terminal
plain_text = terminal.plain_text
def told(text, *style):
    os.kill(os.getpid(), signal.SIGTERM)
    return plain_text(text, *style)
terminal.plain_text = told
"""
_LOADING = """
import os, signal, sys
import stabkit.checkpoints as checkpoints
checkpoints.load = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("program", "processes", "code", "says"),
    [
        (_TELLING, "2", 2, "missing.pt"),
        (_TELLING, "1", -15, ""),
        (_LOADING, "2", 2, "another rank has failed"),
        (_LOADING, "1", -15, ""),
    ],
)
def test_a_rank_that_is_told_to_stop_first_says_why_it_ends(program, processes, code, says, tmp_path):
    program += "sys.argv = ['stabkit', 'analyze', 'missing.pt']\nfrom stabkit.cli import main; main()"
    environment = {**os.environ, "WORLD_SIZE": processes, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert says in done.stderr


@pytest.mark.parametrize(("processes", "code"), [("2", 0), ("1", -6)])
def test_a_rank_ends_well_whatever_its_threads_do_when_the_interpreter_is_taken_down(processes, code):
    program = "import atexit, os, sys; atexit.register(os.abort); sys.argv = ['stabkit', '--version']\n"
    program += "from stabkit.cli import main; main()"
    environment = {**os.environ, "WORLD_SIZE": processes, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.startswith("stabkit ")
