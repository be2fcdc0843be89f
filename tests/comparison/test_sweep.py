from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stabkit.comparison import compare
from stabkit.errors import CheckpointError, TraceError
from stabkit.report import Report

ROOT = Path(__file__).parents[2]


def chain(depth: int = 3) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(depth)])


def scaled(gain: float, depth: int = 3) -> dict[str, torch.Tensor]:
    return {f"{i}.weight": gain * torch.eye(4) for i in range(depth)}


@pytest.fixture
def run(tmp_path):
    """Three epochs whose layers multiply by 1, 2 and 1/2, saved out of order."""
    for epoch, gain in ((10, 2.0), (9, 1.0), (11, 0.5)):
        torch.save({"model": scaled(gain), "epoch": epoch}, tmp_path / f"epoch{epoch}.pt")
    return sorted(tmp_path.glob("*.pt"))


OPTIONS = {"model": chain, "input": "2x4", "spectrum": "dense"}


def test_growth_spectrum_and_drift_of_known_weights(run):
    found = compare(run, over_time=True, **OPTIONS)
    assert [s.step for s in found.snapshots] == [9, 10, 11]
    assert [s.total_growth for s in found.snapshots] == pytest.approx([0, 3 * math.log(2), -3 * math.log(2)], abs=1e-5)
    assert found.growth.shape == (3, 3)
    assert found.radius[:, 0] == pytest.approx([1, 2, 0.5])
    assert [s.margin for s in found.snapshots] == pytest.approx([0, -1, 0.5], abs=1e-6)
    assert [d.growth_change for d in found.drift] == pytest.approx([0, 2.079, -2.079], abs=1e-2)
    assert [d.moved for d in found.drift] == [False, True, True]
    assert found.notes == ("ordered by epoch",)


def test_the_order_given_is_kept_without_over_time(run):
    found = compare(run[::-1], **OPTIONS)
    assert [Path(s.source).name for s in found.snapshots] == [path.name for path in run[::-1]]


def test_every_checkpoint_gets_one_input(run, monkeypatch):
    from stabkit.comparison import sweep

    seen = []
    real = sweep.analyze
    monkeypatch.setattr(
        sweep, "analyze", lambda model, *inputs, **kw: seen.append(inputs[0]) or real(model, *inputs, **kw)
    )
    compare(run, model=chain)
    assert all(torch.equal(x, seen[0]) for x in seen)


def test_a_module_comes_back_as_it_was(run):
    model = chain().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    compare(run, **{**OPTIONS, "model": model})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.training


def test_a_broken_checkpoint_does_not_stop_the_others(run, tmp_path):
    bad = scaled(1.0)
    bad["1.weight"][0, 0] = math.nan
    torch.save({"model": bad, "epoch": 12}, tmp_path / "epoch12.pt")
    (tmp_path / "epoch13.pt").write_bytes(run[0].read_bytes()[:300])
    torch.save({"model": scaled(1.0, depth=4), "epoch": 14}, tmp_path / "epoch14.pt")
    found = compare([*run, tmp_path / "epoch12.pt", tmp_path / "epoch13.pt", tmp_path / "epoch14.pt"], over_time=True,
                    **OPTIONS)  # fmt: skip
    assert [s.state for s in found.snapshots] == ["analysed"] * 3 + ["non-finite", "failed", "failed"]
    assert "1.weight" in found.snapshots[3].message
    assert "damaged" in found.snapshots[4].message
    assert "unknown to the model" in found.snapshots[5].message
    assert any("became non-finite" in sentence for sentence in found.changes)
    assert "non-finite" in str(found)


def test_nothing_to_compare(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints"):
        compare([])
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints.*no file"):
        compare([tmp_path / "a.pt", tmp_path / "b.pt"], model=chain)
    with pytest.raises(CheckpointError, match="base is a module"):
        compare(run, base=chain())


def test_models_of_other_steps_are_compared_as_totals():
    found = compare(["torchvision:squeezenet1_1", "timm:test_vit"], input="1x3x160x160", spectrum="none")
    assert found.step_names == ()
    assert any("totals only" in note for note in found.notes)
    assert found.growth.shape == (2, 0)


def test_a_second_run_takes_everything_from_the_cache(run, tmp_path, monkeypatch):
    from stabkit.comparison import sweep

    folder = tmp_path / "kept"
    first = compare(run, cache=folder, **OPTIONS)
    assert not any(s.cached for s in first.snapshots)
    moved = run[0].rename(tmp_path / "moved.pt")  # the content counts, not the name
    monkeypatch.setattr(sweep, "analyze", None)
    again = compare([moved, *run[1:]], cache=folder, **OPTIONS)
    assert all(s.cached for s in again.snapshots)
    assert (again.growth == first.growth).all()
    assert again.snapshots[0].report.model == str(moved)


@pytest.mark.parametrize("change", [{"spectrum": "none"}, {"seed": 1}, {"input": "3x4"}, {"depth": ["0", "1"]}])
def test_another_recipe_is_not_served_from_the_cache(run, tmp_path, change):
    compare(run, cache=tmp_path / "kept", **OPTIONS)
    found = compare(run, cache=tmp_path / "kept", **{**OPTIONS, **change})
    assert not any(s.cached for s in found.snapshots)


def test_a_damaged_cache_is_made_anew(run, tmp_path):
    folder = tmp_path / "kept"
    first = compare(run, cache=folder, **OPTIONS)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    again = compare(run, cache=folder, **OPTIONS)
    assert not any(s.cached for s in again.snapshots)
    assert (again.growth == first.growth).all()
    assert all(s.cached for s in compare(run, cache=folder, **OPTIONS).snapshots)


def test_a_loss_that_cannot_be_hashed_is_not_cached(run, tmp_path):
    target = torch.ones(4)
    for _ in range(2):
        found = compare(run, cache=tmp_path / "kept", loss=lambda y: ((y - target) ** 2).sum(), **OPTIONS)
        assert not any(s.cached for s in found.snapshots)


def test_an_error_of_the_call_is_raised(run):
    with pytest.raises(CheckpointError, match="spectrum='odd'"):
        compare(run, model=chain, input="2x4", spectrum="odd")
    with pytest.raises((TypeError, TraceError), match="nonsense"):
        compare(run, model=chain, input="2x4", nonsense=1)


@pytest.mark.parametrize("suffix", [".json", ".csv", ".png"])
def test_it_is_written_by_suffix(run, tmp_path, suffix):
    path = compare(run, over_time=True, **OPTIONS).save(tmp_path / f"found{suffix}")
    if suffix == ".json":
        data = json.loads(path.read_text())
        assert data["schema"] == "stabkit.comparison/1"
        assert [s["step"] for s in data["snapshots"]] == [9, 10, 11]
        assert data["snapshots"][0]["report"]["schema"].startswith("stabkit.report/")
    elif suffix == ".csv":
        assert len(path.read_text().splitlines()) == 1 + 3 * 3
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


PROGRAM = """
import sys, time
from pathlib import Path
import stabkit.comparison.sweep as sweep
from tests.comparison.test_sweep import OPTIONS
real = sweep.analyze
def slow(*a, **k):
    time.sleep(0.2)
    return real(*a, **k)
sweep.analyze = slow
sweep.compare(sorted(Path(sys.argv[1]).glob("*.pt")), cache=sys.argv[2], over_time=True, **OPTIONS)
"""


def test_a_killed_sweep_resumes(tmp_path):
    (tmp_path / "run").mkdir()
    for epoch in range(8):
        torch.save({"model": scaled(1 + 0.1 * epoch), "epoch": epoch}, tmp_path / "run" / f"{epoch}.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(tmp_path / "kept")]
    victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "kept").glob("*.report.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    finished = [p for p in (tmp_path / "kept").glob("*.json") if not p.name.endswith(".report.json")]
    assert 2 <= len(finished) < 8
    for file in (tmp_path / "kept").glob("*.report.json"):
        assert Report.load(file).steps
    # by another process than the one that was killed: this one
    found = compare(sorted((tmp_path / "run").glob("*.pt")), cache=tmp_path / "kept", over_time=True, **OPTIONS)
    assert [snapshot.cached for snapshot in found.snapshots].count(True) == len(finished)
