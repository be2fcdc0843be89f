from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.checkpoints import hostile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every file read by a process of its own, with little memory and little time."""
    folder = tmp_path_factory.mktemp("hostile")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a sparse tensor
        hostile.write(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "tests.checkpoints.hostile", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, with_model): (outcome, seconds) for name, with_model, outcome, seconds in rows}


@pytest.mark.parametrize("name", [*hostile.FILES, "adapter"])
@pytest.mark.parametrize("with_model", [True, False], ids=["model", "weights only"])
def test_a_hostile_file_is_refused_in_time_and_memory(outcomes, name, with_model):
    outcome, seconds = outcomes[name, with_model]
    harmless = {"sparse.pt", "meta.pt", "duplicate.safetensors"} if not with_model else set()
    assert outcome.startswith("refused: ") or (name in harmless and outcome == "weights: 0"), outcome
    assert str(Path(name).parts[0]) in outcome or outcome.startswith("weights")
    assert seconds < hostile.SECONDS
