"""Two processes under torchrun: the numbers are those of the whole batch and the whole model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from stabkit.checkpoints.capsules import read_capsule
from stabkit.monitor import replay
from tests.monitor.two_processes import FAULT, POISONED, STEPS, network, train

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

QUANTITIES = ("activation_norm", "gradient_norm", "growth", "parameter_norm", "parameter_gradient_norm", "calls")


Said = dict[str, list[dict]]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> Said:
    """What each process says after the runs under torchrun, by the kind of run."""
    directory: Path = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.monitor.two_processes", str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stabkit's monitor stopped at step 5" in done.stderr  # in the run that fails on purpose
    return {
        kind: [json.loads((directory / kind / f"rank{rank}.json").read_text()) for rank in range(2)]
        for kind in ("ddp", "fsdp", "failing", "poisoned1", "poisoned10")
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_norms_equal_those_of_one_process(kind, said):
    first, second = said[kind]
    model = network()
    truth = train(model, model, 0, 1, None)
    assert len(first["records"]) == STEPS
    for ours, theirs in zip(first["records"], truth.records, strict=True):
        for name in ("gradient_norm", "clipped_norm", "loss"):
            assert float(ours[name]) == pytest.approx(getattr(theirs, name), rel=1e-9, nan_ok=True), name
        for block, expected in zip(ours["blocks"], theirs.blocks, strict=True):
            for name in QUANTITIES:  # what is not a number is written as a word, as strict JSON wants it
                assert float(block[name]) == pytest.approx(getattr(expected, name), rel=1e-9, nan_ok=True), name
    ratios = [b["update_ratio"] for b in first["records"][10]["blocks"]]
    assert ratios == pytest.approx([b.update_ratio for b in truth.records[10].blocks], rel=1e-6)
    assert all(math.isfinite(ratio) for ratio in ratios)
    assert [(f["kind"], f["module_path"]) for f in first["findings"]] == [("non_finite", "layers.1")]
    assert [f["evidence"] for f in first["findings"]] == [f["evidence"] for f in second["findings"]]
    assert [Path(p).name[5:14] for p in first["capsules"]] == ["000000003", f"{FAULT:09d}"]
    for path in first["capsules"]:
        again = replay(path, network)
        assert len(again.capsule.calls) == 4
        assert again.agrees(1e-9), again.differences


def test_a_monitor_that_fails_in_one_process_stops_in_all_and_the_run_goes_on(said):
    first, second = said["failing"]
    assert len(first["records"]) == len(second["records"]) == 5


@pytest.mark.parametrize("every", [1, 10])
def test_each_process_judges_its_own_batch_and_the_first_tells(every, said):
    """With every=10 the batch is told at the next record, beside the loss that is lost before."""
    first, _ = said[f"poisoned{every}"]
    step, process = POISONED
    told = [f["evidence"] for f in first["findings"]]
    expected = f"at training step {step} in process {process} in micro-batch 1 of 2 (from 0) the batch holds a number"
    assert any(expected in evidence for evidence in told), told
    capsule = read_capsule(first["capsules"][0])
    held = [call for call in capsule.calls if call.args[0].isnan().any()]
    assert held or capsule.blamed is not None
