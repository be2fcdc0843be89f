"""What `step` returns: whether a loop should make its update."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from stabkit.monitor import Monitor, read_records
from tests.monitor.networks import mlp, weights

STEPS, POISONED = 40, 25


def run(poison, every=10, *, ask=True, skips=True, lr=0.05):
    """A regression whose batch of one step is poisoned, and the loop leaves out what is not healthy."""
    model = mlp()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    monitor = Monitor(model, every, optimizer=optimizer)
    healthy = []
    for step in range(STEPS):
        x = torch.randn(16, 8)
        y = x[:, :2]
        if step == POISONED:
            x, y = poison(x, y)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        seen = monitor.step(loss)
        healthy.append(seen.healthy if ask else True)
        if healthy[-1] or not skips:
            optimizer.step()
    monitor.close()
    return model, monitor, healthy


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(
    "poison",
    [lambda x, y: (x * math.nan, y), lambda x, y: (x, y + 100.0), lambda x, y: (x, y * math.inf)],
    ids=["nan", "targets", "infinite"],
)
def test_the_poisoned_step_alone_is_left_out(poison, every):
    model, monitor, healthy = run(poison, every)
    assert [step for step, good in enumerate(healthy) if not good] == [POISONED]
    assert all(torch.isfinite(value).all() for value in weights(model))
    assert monitor.records[-1].skipped == 1
    assert monitor.records[0].skipped == 0


def test_healthy_steps_are_taken_and_nobody_pays_who_does_not_ask(monkeypatch):
    from stabkit.monitor.health import Health

    model, monitor, healthy = run(lambda x, y: (x, y))
    assert all(healthy)
    assert monitor.records[-1].skipped == 0
    monkeypatch.setattr(Health, "judge", lambda *_: pytest.fail("was measured without being asked for"))
    other, _, _ = run(lambda x, y: (x, y), ask=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def test_a_loss_that_stays_nan_is_never_let_pass():
    """Also where the gradients are finite, as those of a penalty beside it."""
    model = mlp()
    monitor, healthy = Monitor(model), []
    for step in range(30):
        model.zero_grad()
        loss = model(torch.randn(8, 8)).square().mean()
        loss.backward()
        healthy.append(monitor.step(loss * (math.nan if step >= 15 else 1.0)).healthy)
    assert healthy == [True] * 15 + [False] * 15


@pytest.mark.parametrize("silent", [0, 20])
def test_a_new_level_of_the_loss_is_let_pass(silent):
    """Another task, or a loss that was multiplied by zero for a while, is no broken batch."""
    model = mlp()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor, skipped = Monitor(model, optimizer=optimizer), []
    for step in range(60):
        x = torch.randn(16, 8)
        weight = 1.0 if step < 30 else 0.0 if step < 30 + silent else 100.0
        optimizer.zero_grad()
        loss = weight * (model(x) - x[:, :2]).square().mean()
        loss.backward()
        skipped.append(not monitor.step(loss).healthy)
    assert sum(skipped) <= 4
    assert not any(skipped[40 + silent :])


def test_a_table_of_records_counts_what_was_left_out(tmp_path):
    model = mlp()
    with Monitor(model, 1, writers=tmp_path / "run.csv") as monitor:
        for step in range(3):
            model.zero_grad()
            (model(torch.randn(4, 8)).sum() * (math.nan if step == 1 else 1.0)).backward()
            assert monitor.step().healthy == (step != 1)
    assert [record["skipped"] for record in read_records(tmp_path / "run.csv")] == ["0", "0", "1"]


def test_a_monitor_that_is_off_lets_every_step_pass():
    model = mlp()
    monitor = Monitor(model)
    monitor.detach()
    assert monitor.step(torch.tensor(math.nan)).healthy


def test_findings_are_logged_once_and_a_summary_at_the_end(caplog):
    caplog.set_level(logging.INFO, "stabkit.monitor")
    _, monitor, _ = run(lambda x, y: (x * math.nan, y), every=1, skips=False)
    lines = [(record.levelno, record.getMessage()) for record in caplog.records]
    told = [text for level, text in lines if level >= logging.WARNING]
    assert len(told) == len(monitor.findings) + 1
    assert told[0].startswith(f"stabkit: training step {POISONED}: non_finite")
    assert "\n" not in told[0]
    assert told[-1].startswith(f"stabkit: {STEPS} training steps, {STEPS} recorded: non_finite")


def test_a_healthy_run_says_nothing_on_stderr(capfd):
    run(lambda x, y: (x, y))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_running_statistics_that_a_step_has_spoilt_are_told_although_it_is_left_out():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # holds an infinity by design
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Monitor(model, optimizer=optimizer) as monitor:
        for step in range(30):
            x = torch.randn(16, 8) * (math.nan if step in (20, 21) else 1.0)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if monitor.step(loss).healthy:
                optimizer.step()
    told = [finding for finding in monitor.findings if "buffer" in finding.evidence]
    assert [(finding.module_path, finding.numbers["training_step"]) for finding in told] == [("1", 20)]
    assert "1.running_mean and 1 more is not finite any more" in told[0].evidence
    assert "reset_running_stats()" in told[0].remedy
    assert all(torch.isfinite(p).all() for p in model.parameters())
