"""Capsules: written on alerts and on request, whole or not at all, few, and replayed to the same numbers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.checkpoints import load
from stabkit.checkpoints.capsule_loading import load_capsule
from stabkit.checkpoints.capsules import is_capsule, read_capsule
from stabkit.errors import CheckpointError
from stabkit.monitor import Monitor, replay
from tests.monitor.networks import InPlace, LastStep, Layers, capsule_mlp, mlp

FACTORY = "tests.monitor.networks:capsule_mlp"


def run(model: nn.Module, draw, directory: Path, *, steps: int = 3, parts: int = 1, ask: int = 0, **options) -> Monitor:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, 1, directory=directory, **options)
    for step in range(steps):
        optimizer.zero_grad()
        if step == ask:
            monitor.capsule()
        for _ in range(parts):
            (model(draw()).square().mean() / parts).backward()
        monitor.step()
        optimizer.step()
    monitor.close()
    return monitor


class Spectral(nn.Module):
    """Its buffers change at every call, and the output with them; it returns a loss beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)) for _ in range(3)])

    def forward(self, x: Tensor, *, target: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


CASES = {
    "dropout": (capsule_mlp, lambda: torch.randn(4, 8), 1),
    "micro_batches": (capsule_mlp, lambda: torch.randn(4, 8), 3),
    "batch_norm": (InPlace, lambda: torch.randn(4, 2, 5, 5), 2),
    "recurrent": (LastStep, lambda: torch.randn(4, 3, 8), 1),
    "spectral_norm": (Spectral, lambda: torch.randn(4, 6), 2),
    "checkpointed": (lambda: Layers("not_reentrant"), lambda: torch.randn(4, 6), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_capsule_replays_to_the_same_numbers(name, tmp_path):
    build, draw, parts = CASES[name]
    monitor = run(build(), draw, tmp_path, parts=parts, ask=2)
    (path,) = monitor.capsules
    state = torch.get_rng_state()
    again = replay(path, build)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.agrees(1e-6), again.differences
    assert len(again.capsule.calls) == parts
    assert again.capsule.records[-1]["step"] == 2


def test_a_capsule_under_autocast_with_a_loss_scale_replays(tmp_path):
    model = capsule_mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    monitor = Monitor(model, 1, directory=tmp_path, writers=[], scaler=scaler)
    monitor.capsule()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 8)).float().square().mean()
    scaler.scale(loss).backward()
    monitor.step(loss)
    again = replay(monitor.capsules[0], FACTORY)
    assert again.capsule.autocast == {"cpu": "bfloat16"}
    assert again.agrees(1e-3), again.differences


class Heads(nn.Module):
    """Returns logits and the loss on them, and an auxiliary output that the loss outside uses as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])

    def forward(self, x: Tensor, aux: bool = True) -> dict[str, Tensor]:
        hidden = torch.tanh(self.layers[1](torch.tanh(self.layers[0](x))))
        logits = self.layers[2](hidden)
        return {"hidden": hidden, "logits": logits} if aux else {"loss": logits.square().mean(), "logits": logits}


@pytest.mark.parametrize("aux", [False, True])
def test_outputs_that_depend_on_each_other_are_not_counted_twice(aux, tmp_path):
    model = Heads().double()
    monitor = Monitor(model, 1, directory=tmp_path, writers=[])
    monitor.capsule()
    out = model(torch.randn(4, 5, dtype=torch.float64), aux=aux)
    loss = out["logits"].exp().mean() + 0.3 * out["hidden"].square().sum() if aux else out["loss"]
    loss.backward()
    monitor.step(loss)
    again = replay(monitor.capsules[0], lambda: Heads().double())
    assert again.agrees(1e-10), again.differences
    recalled = load_capsule(monitor.capsules[0], lambda: Heads().double())
    output = recalled.module(*recalled.inputs, **recalled.kwargs)
    found = torch.autograd.grad(recalled.loss(output), recalled.module.layers[0].weight)[0]
    assert torch.allclose(found, model.layers[0].weight.grad, rtol=1e-10)


def test_a_capsule_loads_as_a_model_with_the_loss_of_the_run(tmp_path):
    model = capsule_mlp()
    monitor = run(model, lambda: torch.randn(4, 8), tmp_path, ask=2)
    recalled = load_capsule(monitor.capsules[0], FACTORY)
    assert recalled.step == ("step", 2)
    assert recalled.module.training
    outputs = [recalled.module(*recalled.inputs) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1])  # dropout drops what it dropped in the run
    recalled.loss(outputs[0]).backward()
    gradient = recalled.module[0].weight.grad.norm().item()
    assert gradient == pytest.approx(monitor.records[-1].blocks[0].parameter_gradient_norm, rel=0.2)


def test_the_analysis_of_a_capsule_finds_the_norms_that_were_recorded(tmp_path):
    monitor = run(Layers(), lambda: torch.randn(4, 6), tmp_path)
    recalled = load_capsule(monitor.capsules[0], Layers)
    flow = stabkit.trace(recalled.module, *recalled.inputs)
    profile = stabkit.gradient_profile(flow, recalled.loss)
    blocks = monitor.records[0].blocks
    gradients = profile.gradient_norms.square().sum(1).sqrt()[-3:].tolist()
    states = profile.state_norms.square().sum(1).sqrt()[-3:].tolist()
    assert gradients == pytest.approx([block.gradient_norm for block in blocks], rel=1e-5)
    assert states == pytest.approx([block.activation_norm for block in blocks], rel=1e-5)


def test_analyze_draws_the_random_numbers_of_the_run(tmp_path):
    monitor = run(capsule_mlp(), lambda: torch.randn(4, 8), tmp_path)
    recalled = load_capsule(monitor.capsules[0], FACTORY)
    flow = stabkit.trace(recalled.module, *recalled.inputs, seed=5)
    profile = stabkit.gradient_profile(flow, recalled.loss)
    last = profile.gradient_norms.square().sum(1).sqrt()[-1].item()
    assert last == pytest.approx(monitor.records[0].blocks[3].gradient_norm, rel=1e-5)
    state = profile.state_norms.square().sum(1).sqrt()[-1].item()
    assert state == pytest.approx(monitor.records[0].blocks[3].activation_norm, rel=1e-5)


def test_not_finite_writes_one_capsule_and_a_lasting_state_no_more(tmp_path):
    model = mlp()
    monitor = Monitor(model, 1, directory=tmp_path, writers=[])
    for step in range(6):
        if step == 2:
            with torch.no_grad():
                model[3].weight[0, 0] = torch.nan
        model.zero_grad()
        model(torch.randn(4, 8)).sum().backward()
        monitor.step()
    (path,) = monitor.capsules
    assert path.name == "step-000000002-non-finite"
    assert monitor.findings[0].module_path == "3"
    assert replay(path, mlp).agrees()


def test_disk_use_is_bounded_and_leftovers_go(tmp_path):
    model = mlp()
    monitor = Monitor(model, 1, directory=tmp_path, writers=[], capsules=2)
    left = tmp_path / "capsules" / ".step-000000000-killed.abc"
    left.mkdir(parents=True)
    for _ in range(5):
        monitor.capsule("look")
        model(torch.randn(4, 8)).sum().backward()
        monitor.step()
    assert [p.name for p in monitor.capsules] == ["step-000000003-look", "step-000000004-look"]
    assert len(list((tmp_path / "capsules").iterdir())) == 2


def test_a_request_between_two_records_is_served_by_the_next_whole_step(tmp_path):
    model = mlp()
    monitor = Monitor(model, 100, directory=tmp_path, writers=[])
    for step in range(6):
        model(torch.randn(4, 8)).sum().backward()
        if step == 3:
            monitor.capsule()
        monitor.step()
    assert [r.step for r in monitor.records] == [0, 4]
    assert monitor.capsules[0].name.startswith("step-000000004")


def test_a_batch_that_no_file_can_hold_is_said_to_be_lost(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor, how: object) -> Tensor:
            return self.layers(x)

    model = Odd()
    monitor = Monitor(model, 1, directory=tmp_path, writers=[])
    monitor.capsule()
    model(torch.randn(2, 8), object()).sum().backward()
    monitor.step()
    with pytest.raises(CheckpointError, match="was a object, which a capsule cannot hold"):
        read_capsule(monitor.capsules[0])


def test_a_disk_that_fails_ends_the_capsules_but_not_the_run(tmp_path):
    (tmp_path / "capsules").write_text("in the way")
    model = mlp()
    monitor = Monitor(model, 1, directory=tmp_path, writers=[])
    for step in range(2):
        monitor.capsule()
        model(torch.randn(2, 8)).sum().backward()
        with pytest.warns(RuntimeWarning, match="writing capsules failed") if step == 0 else contextlib.nullcontext():
            monitor.step()
    assert len(monitor.records) == 2


VICTIM = """
import sys, torch
from stabkit.monitor import Monitor
from tests.monitor.networks import mlp
model = mlp(width=64)
monitor = Monitor(model, 1, directory=sys.argv[1], capsules=2)
print("ready", flush=True)
while True:
    monitor.capsule("again")
    model.zero_grad()
    model(torch.randn(32, 64)).square().mean().backward()
    monitor.step()
"""


def test_what_a_killed_process_leaves_is_whole(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(is_capsule(p) for p in (tmp_path / "capsules").glob("step-*")):
            time.sleep(0.05)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = sorted((tmp_path / "capsules").glob("step-*"))
    assert 1 <= len(kept) <= 3
    for path in kept:
        assert replay(path, lambda: mlp(width=64)).agrees(1e-5)
    lines = (tmp_path / "records.jsonl").read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(len(lines) - 1))


def test_a_capsule_says_first_what_the_monitor_knew(tmp_path):
    model = capsule_mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(8, 8)
    with Monitor(model, 10, optimizer=sgd, directory=tmp_path) as monitor:
        for step in range(30):
            sgd.param_groups[0]["lr"] = 0.01 if step < 20 else 50.0
            sgd.zero_grad()
            loss = (model(x) - 1.0).square().mean()
            loss.backward()
            monitor.step(loss)
            sgd.step()
    capsule = read_capsule(monitor.capsules[0])
    assert capsule.known["optimizers"][0]["class"] == "SGD"
    assert capsule.known["optimizers"][0]["groups"][0]["lr"] == 50.0
    assert "jumped at training step 20 from 0.01 to 50" in capsule.findings[0]["evidence"]
    loaded = load(monitor.capsules[0], model=FACTORY)
    assert loaded.trained
    lines = loaded.description.splitlines()
    assert lines[1].startswith("the monitor said: at training step 21")
    assert lines[2].startswith("remedy: lower the learning rate to below")
    assert "optimizer: SGD at the learning rate 50" in lines


def test_weights_that_were_trained_were_not_started_so():
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(16, 16), nn.ReLU())], nn.Linear(16, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(30.0)
    x, y = torch.randn(16, 16), torch.randint(0, 2, (16,))
    loss = lambda out: nn.functional.cross_entropy(out, y)  # noqa: E731
    told = {}
    for trained in (False, True):
        report = stabkit.analyze(model, x, loss=loss, spectrum="none", trained=trained)
        told[trained] = " ".join(f"{f.evidence} {f.remedy}" for f in report.findings)
    assert "were started large" in told[False]
    assert "start" not in told[True].replace("restart", "")
