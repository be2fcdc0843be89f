"""A batch that is out of range is named, at its own step, and is what the capsule is analysed with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabkit.checkpoints import load
from stabkit.checkpoints.capsules import read_capsule
from stabkit.monitor import Monitor, replay
from tests.monitor.networks import hooks_of, mlp

AT, STEPS = 57, 75


def wide():
    return mlp(width=16, depth=4)


def train(spoil, every, *, lr=0.02, directory=None, named=False):
    model = wide()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, *, image):
            return self.net(image)

    outer = Outer() if named else model
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(outer.parameters(), lr=lr)
    with Monitor(outer, every, optimizer=optimizer, directory=directory, writers=[]) as monitor:
        for step in range(STEPS):
            x = torch.randn(32, 16)
            y = torch.tanh(x[:, :2])
            if step == AT:
                x = spoil(x)
            optimizer.zero_grad()
            loss = (outer(image=x) if named else outer(x)).sub(y).square().mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert hooks_of(outer) == 0
    return monitor


def one_nan(x):
    x = x.clone()
    x[7, 3] = math.nan
    return x


@pytest.mark.parametrize("every", [1, 10, 50])
def test_a_nan_of_the_data_is_found_in_its_sample(every):
    first = train(one_nan, every).findings[0]
    assert first.kind == "non_finite"
    assert (
        f"at training step {AT} the batch holds a number that is not finite in its input 0, in sample 7"
        in first.evidence
    )
    assert "look at this batch" in first.remedy


class Linear(nn.Module):
    """A network whose loss follows the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)], nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("every", [1, 10, 50])
def test_values_out_of_range_are_blamed_and_not_the_rate(monkeypatch, every, tmp_path):
    monkeypatch.setitem(globals(), "wide", Linear)
    monitor = train(lambda x: 1000.0 * x, every, directory=tmp_path)
    first = monitor.findings[0]
    assert first.kind == "exploding"
    assert f"at training step {AT} the batch is out of range" in first.evidence
    assert "rate" not in first.remedy
    capsule = read_capsule(monitor.capsules[0])
    assert capsule.step in (AT, AT + 1)
    assert (capsule.blamed is None) == (capsule.step == AT)
    loaded = load(monitor.capsules[0], model=Linear)
    assert float(loaded.inputs[0].abs().max()) > 1000.0
    assert f"on the batch of step {AT}" in loaded.description
    assert replay(monitor.capsules[0], Linear).agrees()


def test_inputs_by_keyword_are_named():
    assert "in its input image" in train(one_nan, 10, named=True).findings[0].evidence


def test_an_odd_batch_that_harms_nothing_is_no_alarm():
    """Saturated units bear what is a hundred times as large."""
    monitor = train(lambda x: 100.0 * x, 10)
    assert monitor.findings == []


def test_the_sample_that_carries_the_gradient_is_told(tmp_path):
    def one_sample(x):
        x = x.clone()
        x[5] *= 1000.0
        return x

    (first, *_) = train(one_sample, 1, lr=1e-6).findings  # tanh bears it, and its first layer shows it
    assert "the batch is out of range" in first.evidence
    model = Linear()
    with Monitor(model, 1, directory=tmp_path, writers=[]) as monitor:
        monitor.capsule()
        model(one_sample(torch.randn(32, 16))).square().mean().backward()
        monitor.step()
    told = load(monitor.capsules[0], model=Linear).description
    assert "gradient at the output: sample 5 of 32 carries 100 % of its squares" in told


def test_an_input_that_holds_infinities_by_design_is_never_blamed():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide()

        def forward(self, x, mask):
            return self.net(x) * torch.softmax(mask, -1).sum()

    model = Masked()
    mask = torch.tensor([0.0, 0.0, -math.inf])
    with Monitor(model, 10) as monitor:
        for step in range(30):
            model.zero_grad()
            loss = model(torch.randn(8, 16), mask).square().mean() * (math.nan if step == 25 else 1.0)
            loss.backward()
            monitor.step(loss)
    assert monitor.findings[0].kind == "non_finite"
    assert "batch holds" not in monitor.findings[0].evidence


def test_inputs_without_a_range_stop_nothing():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide()

        def forward(self, x, adjacency):
            return self.net(torch.sparse.mm(adjacency, x))

    model, adjacency = Graph(), torch.eye(32).to_sparse()
    with Monitor(model, 1) as monitor:
        for _ in range(12):
            model.zero_grad()
            loss = model(torch.randn(32, 16), adjacency).square().mean()
            loss.backward()
            monitor.step(loss)
    assert len(monitor.records) == 12


def test_a_second_run_into_a_directory_keeps_its_own_capsules(tmp_path):
    for _ in range(2):
        model = wide()
        monitor = Monitor(model, 1, directory=tmp_path, capsules=2)
        for step in range(4):
            if step > 1:
                monitor.capsule("look")
            model.zero_grad()
            model(torch.randn(4, 16)).sum().backward()
            monitor.step()
        assert len(monitor.capsules) == 2
        assert all(replay(path, wide).agrees() for path in monitor.capsules)
        assert len([path for path in (tmp_path / "capsules").iterdir() if path.name.startswith("step-")]) == 2
        monitor.close()


@pytest.mark.parametrize("every", [1, 10])
def test_of_micro_batches_the_odd_one_is_named_and_kept(every, tmp_path):
    model = wide()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with Monitor(model, every, optimizer=optimizer, directory=tmp_path, writers=[]) as monitor:
        for step in range(16):
            optimizer.zero_grad()
            total = 0.0
            for number in range(4):
                x = torch.randn(8, 16)
                x = one_nan(x) if (step, number) == (13, 1) else x
                loss = model(x).sub(torch.tanh(x[:, :2])).square().mean() / 4
                loss.backward()
                total += loss.detach()
            monitor.step(total)
            optimizer.step()
    words = "at training step 13 in micro-batch 1 of 4 (from 0) the batch holds a number that is not finite"
    assert words in monitor.findings[0].evidence
    loaded = load(monitor.capsules[0], model=wide)
    assert loaded.inputs[0].isnan().any()
    assert monitor._foresight._batches._held.__len__() <= 4


def test_micro_batches_that_are_large_are_not_all_held(monkeypatch):
    import stabkit.monitor.batches as batches

    monkeypatch.setattr(batches, "_HELD", 2 * 8 * 16 * 4)
    model = wide()
    monitor = Monitor(model, 10)
    for _ in range(5):
        model(torch.randn(8, 16)).square().mean().backward()
    assert len(monitor._foresight._batches._held) == 2
    monitor.close()
