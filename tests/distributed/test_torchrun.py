from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabkit import checkpoints
from stabkit.cli.options import Recipe
from stabkit.cli.scale import analyzed

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
PROGRAM = """
import json, sys
from stabkit import checkpoints
from stabkit.cli.console import guarded
from tests.distributed.test_torchrun import recipe
from stabkit.cli.scale import analyzed

with guarded(False):
    report = analyzed(checkpoints.load(sys.argv[1], input="4x4"), recipe())
    if report is not None:
        print(json.dumps(report.to_dict()))
"""


def recipe() -> Recipe:
    return Recipe(None, "4x4", None, None, "raw", None, False, False, False, "auto", "krylov", 0)


def torchrun(folder: Path, factory: str) -> subprocess.CompletedProcess[str]:
    (folder / "networks.py").write_text(NETWORK)
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "program.py"), f"{folder / 'networks.py'}:{factory}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_torchrun_gives_one_report_that_is_the_plain_one(tmp_path):
    done = torchrun(tmp_path, "chain")
    assert done.returncode == 0, done.stderr
    (told,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    alone = analyzed(checkpoints.load(f"{tmp_path / 'networks.py'}:chain", input="4x4"), recipe()).to_dict()
    for mine, other in zip(told["steps"], alone["steps"], strict=True):
        for name in ("growth", "largest_singular_value", "spectral_radius"):
            assert mine[name] == (
                other[name] if other[name] is None else pytest.approx(other[name], rel=1e-4, abs=1e-5)
            )
    assert told["verdict"] == alone["verdict"]


def test_a_rank_that_dies_ends_the_run_with_a_message(tmp_path):
    done = torchrun(tmp_path, "dying")
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr
    assert "another rank" in done.stderr or "another of the 2 ranks is gone" in done.stderr
