"""The last good state of a training: when it is taken, what it costs, and what a capsule makes of it."""

from __future__ import annotations

import math

import pytest
import torch

from stabkit.checkpoints import load
from stabkit.checkpoints.capsules import read_capsule
from stabkit.errors import CheckpointError
from stabkit.monitor import Monitor, replay, snapshots
from stabkit.monitor.snapshots import SLOTS, Snapshots
from tests.monitor.networks import mlp, weights

BREAKS = 60
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def wide():
    return mlp(width=16, depth=4)


def train(directory, optimizer, every, damage, *, steps=BREAKS + 20, **options):
    """A regression in which something is damaged before the forward pass of one step; the weights of every step too."""
    model = wide()
    torch.manual_seed(1)
    made = OPTIMIZERS[optimizer](model.parameters())
    seen = []
    with Monitor(model, every, optimizer=made, directory=directory, writers=[], **options) as monitor:
        for step in range(steps):
            x = torch.randn(32, 16)
            y = x[:, :2]
            if step == BREAKS:
                x, y = damage(made, x, y)
            seen.append(weights(model))
            made.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            monitor.step(loss)
            made.step()
    return monitor, seen


def raise_rate(optimizer, x, y):
    for group in optimizer.param_groups:
        group["lr"] *= 3000.0
    return x, y


def poison(optimizer, x, y):
    return x, y * math.inf


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rate_that_breaks_leaves_the_weights_from_before_it(tmp_path, optimizer, every):
    monitor, seen = train(tmp_path, optimizer, every, raise_rate)
    path = monitor.capsules[0]
    capsule = read_capsule(path)
    step = capsule.before["step"]
    assert step <= BREAKS
    loaded = load(path, model=wide)
    for name, value in loaded.model.state_dict().items():
        index = list(wide().state_dict()).index(name)
        assert torch.equal(value, seen[step][index])
    assert f"weights: the last good ones, of training step {step}" in loaded.description
    assert "since then the learning rate changed:" in loaded.description
    assert "since then the weights moved, most of all" in loaded.description
    broken = load(path, model=wide, weights="step")
    assert not torch.equal(next(broken.model.parameters()), next(loaded.model.parameters()))
    assert replay(path, wide).agrees()


def test_a_poisoned_batch_meets_the_last_good_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_SHARE", math.inf)  # whatever they cost
    monitor, _ = train(tmp_path, "adam", 1, poison)
    capsule = read_capsule(monitor.capsules[0])
    assert capsule.step in (BREAKS, BREAKS + 1)
    assert capsule.before["step"] < BREAKS
    held = {name.split("/")[0] for name in capsule_tensors(monitor.capsules[0])}
    assert held == {"weights", "optimizer", "random"}
    loaded = load(monitor.capsules[0], model=wide)
    assert not loaded.non_finite
    assert "loss: left out, its gradient at the output was not finite" in loaded.description


def capsule_tensors(path):
    from safetensors.torch import load_file

    return load_file(path / "before.safetensors")


def test_a_capsule_without_one_says_why(tmp_path):
    monitor, _ = train(tmp_path / "off", "sgd", 1, poison, snapshot_memory=0)
    assert "there is none: snapshot_memory=0" in load(monitor.capsules[0], model=wide).description
    monitor, _ = train(tmp_path / "small", "sgd", 1, poison, snapshot_memory=100)
    assert "more than snapshot_memory" in load(monitor.capsules[0], model=wide).description


def test_a_capsule_that_was_asked_for_is_of_its_own_step(tmp_path):
    model = wide()
    monitor = Monitor(model, 1, directory=tmp_path, writers=[])
    for step in range(3):
        if step == 2:
            monitor.capsule()
        model(torch.randn(4, 16)).sum().backward()
        monitor.step()
    assert "last good" not in load(monitor.capsules[0], model=wide).description


def test_weights_of_the_step_have_no_meaning_elsewhere(tmp_path):
    torch.save(wide().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="weights='step' has no meaning"):
        load(tmp_path / "plain.pt", model=wide, weights="step", input="4x16")


def test_training_is_the_same_to_the_last_bit_and_the_ring_is_bounded(tmp_path):
    _, with_ring = train(tmp_path / "a", "adam", 5, lambda o, x, y: (x, y))
    _, without = train(tmp_path / "b", "adam", 5, lambda o, x, y: (x, y), snapshot_memory=0)
    assert all(torch.equal(a, b) for a, b in zip(with_ring[-1], without[-1], strict=True))
    model = wide()
    size = sum(value.numel() * 4 for value in model.state_dict().values())
    for memory, slots in ((10 * size, SLOTS), (2 * size, 2), (size, 1)):
        ring = Snapshots(model, [], memory)
        for step in range(0, 200, 20):
            ring._not_before = 0.0
            ring.look(step, 0.0)
        assert len(ring._ring) == slots
        assert ring.before(1000).step == 180
        kept = ring._ring[-1].tensors["weights/0.weight"].clone()
        with torch.no_grad():
            model[0].weight.add_(1.0)
        assert torch.equal(ring._ring[-1].tensors["weights/0.weight"], kept)


def test_a_snapshot_with_a_nan_is_passed_over():
    model = wide()
    ring = Snapshots(model, [], 2**20)
    ring.look(0, 0.0)
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    ring._not_before = 0.0
    ring.look(50, 0.0)
    assert ring.before(60).step == 0
