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
    (tmp_path / "elsewhere").mkdir()
    moved = run[0].rename(tmp_path / "elsewhere" / run[0].name)  # the content counts, not the place
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


def cached(run, folder, **options):
    found = compare(run, cache=folder, **{**OPTIONS, **options})
    anew = compare(run, **{**OPTIONS, **options})
    assert (found.growth == anew.growth).all()
    assert [s.step for s in found.snapshots] == [s.step for s in anew.snapshots]
    return [s.cached for s in found.snapshots]


def test_a_loss_counts_with_what_it_closes_over(run, tmp_path):
    target, folder = torch.ones(4), tmp_path / "kept"
    for _ in range(2):
        last = cached(run, folder, loss=lambda y: ((y - target) ** 2).sum())
    assert all(last)
    target = torch.zeros(4)
    assert not any(cached(run, folder, loss=lambda y: ((y - target) ** 2).sum()))
    for _ in range(2):  # nothing tells what is left of it
        left = (value for value in (0.0,))
        assert not any(cached(run, folder, loss=lambda y, left=left: (y**2).sum() + 0 * len([left])))


SLOPE = 1.0


class Sloped(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return SLOPE * self.table[0] * x


def test_a_model_counts_with_its_code_and_all_that_hangs_on_it(run, tmp_path, monkeypatch):
    def model(value=1.0, act=torch.tanh):
        chained = chain()
        chained.add_module("sloped", Sloped([value]))
        chained.register_forward_hook(lambda module, args, out: act(out))
        return chained

    folder = tmp_path / "kept"
    assert not any(cached(run, folder, model=model))
    assert all(cached(run, folder, model=model))
    assert not any(cached(run, folder, model=lambda: model(2.0)))
    assert not any(cached(run, folder, model=lambda: model(act=torch.sin)))
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    assert not any(cached(run, folder, model=model))


FACTORY = "from torch import nn\nimport {helper}\ndef make(gain=1.0):\n    return {helper}.Net(gain)\n"
HELPER = """
from torch import nn
GAINS = [{gain}]
class Net(nn.Sequential):
    def __init__(self, gain):
        super().__init__(*[nn.Linear(4, 4, bias=False) for _ in range(3)])
        self.gain = lambda: gain
    def forward(self, x):
        return GAINS[0] * self.gain() * super().forward(x)
"""


def test_a_factory_counts_with_the_files_that_it_imports(run, tmp_path):
    def state(gain, **options):
        (tmp_path / "zoo.py").write_text(FACTORY.format(helper="neighbour"))
        (tmp_path / "neighbour.py").write_text(HELPER.format(gain=gain))
        sys.modules.pop("neighbour", None)
        return cached(run, tmp_path / "kept", model=f"{tmp_path / 'zoo.py'}:make", **options)

    assert not any(state(1.0))
    assert all(state(1.0))
    assert not any(state(2.0))
    assert not any(state(2.0, factory_args={"gain": 3.0}))


def test_a_count_in_the_name_and_the_input_of_the_first_are_those_of_today(tmp_path):
    folder = tmp_path / "kept"
    run = [tmp_path / f"step{i}.pt" for i in (1, 2)]
    for i, path in enumerate(run, 1):
        torch.save(scaled(1.0 + i), path)
    assert not any(cached(run, folder))
    renamed = [run[0], run[1].rename(tmp_path / "step7.pt")]
    assert cached(renamed, folder) == [True, False]
    # the other one alone has an input of its own
    np = pytest.importorskip("numpy")
    np.save(tmp_path / "x.npy", np.ones((2, 4), "float32"))
    assert not any(cached(run[:1], folder, input=str(tmp_path / "x.npy")))
    np.save(tmp_path / "x.npy", -np.ones((2, 4), "float32"))
    assert not any(cached(run[:1], folder, input=str(tmp_path / "x.npy")))


def test_a_checkpoint_that_is_written_meanwhile_is_not_kept(run, tmp_path, monkeypatch):
    from stabkit.comparison import sweep

    real = sweep.content_hash

    def hashed(path):
        found = real(path)
        torch.save({"model": scaled(3.0), "epoch": 9}, path)
        return found

    kept = run[0].read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "content_hash", hashed)
        compare(run[:1], cache=tmp_path / "kept", **OPTIONS)
    run[0].write_bytes(kept)
    assert cached(run[:1], tmp_path / "kept") == [False]


def test_a_kept_file_with_one_wrong_digit_is_made_anew(run, tmp_path):
    folder = tmp_path / "kept"
    compare(run, cache=folder, **OPTIONS)
    for file in folder.iterdir():
        text = file.read_text()
        place = next(j for j, c in enumerate(text[len(text) // 3 :], len(text) // 3) if c in "123")
        file.write_text(text[:place] + "4" + text[place + 1 :])
    assert not any(cached(run, folder))
    assert all(cached(run, folder))


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
