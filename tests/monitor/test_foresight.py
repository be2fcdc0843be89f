"""A rate that ends a training is named within three steps whatever is recorded; healthy runs hear nothing."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from torch import nn

from stabkit.curvature import Secant
from stabkit.monitor import Monitor, read_records
from stabkit.monitor.causes import Causes
from stabkit.monitor.learning_rates import LearningRates
from stabkit.monitor.losses import LossJumps, LossReader
from stabkit.monitor.rules import AlertRules
from tests.monitor.networks import mlp
from tests.monitor.runs import BLOW_UPS, HEALTHY, SGD, adversaries, watched
from tests.monitor.test_alerts import two_classes

JUMPS = [name for name in BLOW_UPS if "x100" in name]


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("name", JUMPS)
def test_a_rate_that_jumps_is_named_within_three_steps(name, every):
    *run, at = BLOW_UPS[name]
    monitor, _ = watched(*run, steps=at + 5, every=every)
    first = monitor.findings[0]
    assert at < first.numbers["training_step"] <= at + 3
    assert first.kind in ("unstable_update", "exploding")  # by the loss, or by the gradients of a record
    assert (first.numbers["rate_step"], first.numbers["rate_after"]) == (at, run[3](at))
    assert f"the learning rate jumped at training step {at}" in first.evidence
    assert first.numbers["lower_to"] < run[3](at)
    assert "lower the learning rate to below" in first.remedy


@pytest.mark.parametrize("name", [name for name in BLOW_UPS if name not in JUMPS])
def test_a_rate_that_is_too_high_at_once_or_climbs_is_named(name):
    *run, _ = BLOW_UPS[name]
    monitor, losses = watched(*run, steps=60, every=10)
    first = monitor.findings[0]
    attention = first.kind == "diverging_logits"  # which grows before the loss does
    assert attention or first.kind == "unstable_update"
    assert "the learning rate" in first.evidence
    end = next((i for i, loss in enumerate(losses) if not loss < 10 * losses[0]), 60)
    assert first.numbers["training_step"] <= end + 1


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_hear_nothing(name, every):
    monitor, _ = watched(*HEALTHY[name], steps=80, every=every, seed=3)
    assert monitor.findings == []


def test_adversaries_hear_nothing():
    assert [monitor.findings for monitor in adversaries(1)] == [[], [], []]


def far_outliers():
    """A line under noise without a variance, whose weights start at a tenth of what they come to."""
    noise = torch.distributions.StudentT(1.7)
    slope = 3.0 * torch.randn(8)
    model = nn.Linear(8, 1)

    def loss():
        x = torch.randn(16, 8)
        return nn.functional.mse_loss(model(x)[:, 0], x @ slope + 0.3 * noise.sample((16,)))

    return model, SGD(model.parameters(), lr=0.02), loss


def rare_inputs():
    """Few inputs that are not zero, some of them large, under Adagrad, whose first updates are its longest."""
    slope = torch.randn(40)
    model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 2))

    def loss():
        x = (torch.rand(16, 40) < 0.05) * torch.randn(16, 40).exp()
        return nn.functional.cross_entropy(model(x), (x @ slope > 0).long())

    return model, torch.optim.Adagrad(model.parameters(), lr=0.1), loss


@pytest.mark.parametrize("kind", [far_outliers, rare_inputs])
def test_weights_that_start_small_may_move_far_while_few_losses_are_known(kind):
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, optimizer, draw = kind()
        with Monitor(model, 10, optimizer=optimizer) as monitor:
            for _ in range(20):
                optimizer.zero_grad()
                loss = draw()
                loss.backward()
                monitor.step(loss)
                optimizer.step()
        found += monitor.findings
    assert found == []


def test_a_curvature_that_hovers_about_its_threshold_does_not_convict_the_rate():
    def convicted(*ratios: float) -> bool:
        causes = Causes(LearningRates([]))
        for step, ratio in enumerate(ratios):
            causes.add(step, Secant(2.0, 2.0 / ratio, ratio, 0.1, 0.1 / ratio, update_ratio=0.1))
        return causes.convicts_rate(len(ratios))

    assert not convicted(0.9, 1.17, 1.01)  # full batches at the edge of stability, on the way up and down again
    assert convicted(0.9, 1.17, 1.5)


def test_the_curvature_along_updates_is_in_records_and_files(tmp_path):
    files = [tmp_path / "run.jsonl", tmp_path / "run.csv"]
    monitor, _ = watched(*HEALTHY["MLP, momentum"], steps=6, every=2, writers=files)
    assert [record.along and record.along.step for record in monitor.records] == [None, 2, 4]
    along = monitor.records[1].along.found
    assert monitor.records[1].scalars()["ratio_along_update"] == along.ratio
    for path in files:
        read = [record["curvature_along_update"] for record in read_records(path)]
        assert read[0] is None
        assert float(read[1]["ratio"]) == along.ratio


def test_one_batch_far_out_is_not_blamed_on_the_rate():
    torch.manual_seed(0)
    model, draw = mlp(16, 2), two_classes(16)
    sgd = SGD(model.parameters(), lr=0.1)
    with Monitor(model, 1, optimizer=sgd) as monitor:
        for step in range(40):
            x, y = draw()
            sgd.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) * (1e5 if step == 30 else 1.0)
            loss.backward()
            monitor.step(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            sgd.step()
    assert monitor.findings
    assert {f.numbers["training_step"] for f in monitor.findings} == {30}
    assert not any("learning rate" in f.evidence.replace("neither the learning rate", "") for f in monitor.findings)


def test_a_loss_that_breaks_between_two_records_is_told_once_with_its_step():
    model = mlp(16, 2)
    sgd = SGD(model.parameters(), lr=0.1)
    with Monitor(model, 10, optimizer=sgd) as monitor:
        for step in range(16):
            sgd.zero_grad()
            loss = model(torch.ones(2, 16)).sum() * (math.nan if step >= 13 else 1.0)
            loss.backward()
            monitor.step(loss)
            sgd.step()
    (finding,) = monitor.findings
    assert (finding.kind, finding.numbers["training_step"]) == ("non_finite", 13)
    assert [record.step for record in monitor.records] == [0, 10, 14, 15]


def test_a_norm_beyond_1e19_is_finite():
    model = mlp(16, 2)
    with Monitor(model, 1) as monitor:
        (1e22 * model(torch.ones(2, 16)).sum()).backward()
        monitor.step()
    (record,) = monitor.records
    assert record.non_finite == 0
    assert 1e20 < record.gradient_norm < math.inf
    assert 1e20 < record.blocks[0].gradient_norm < math.inf


def test_losses_of_a_device_are_read_when_they_are_there_and_never_waited_for():
    reader = LossReader()
    ready: list[bool] = []

    class Event:
        def query(self):
            return bool(ready)

    reader._waiting = deque([(0, torch.tensor(2.0), Event()), (1, torch.tensor(3.0), Event())])
    assert reader.take(2, None) == []
    ready.append(True)
    assert reader.take(3, 4.0) == [(0, 2.0), (1, 3.0), (3, 4.0)]


def test_rates_of_groups_and_what_is_no_rise():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    sgd = SGD([{"params": layer.parameters(), "lr": 0.1} for layer in layers])
    rates = LearningRates([sgd])
    for step in range(12):
        sgd.param_groups[1]["lr"] = {5: 1e-3, 6: 0.1}.get(step, 0.1 if step < 9 else 20.0)  # a restart, then a jump
        rates.see(step)
    restart = rates.rise(7)
    assert restart is not None
    assert restart.beyond == pytest.approx(1.0)
    rise = rates.rise(11)
    assert str(rise) == "the learning rate of group 1 jumped at training step 9 from 0.1 to 20"
    assert rise.beyond == pytest.approx(200.0)
    assert rates.rise(9) is None or rates.rise(9).step < 9  # what comes with the next update


def test_a_loss_that_lasts_becomes_usual():
    jumps = LossJumps(AlertRules())
    levels = [1.0] * 20 + [9.0] * 60
    told = [step for step, value in enumerate(levels) if jumps.add(step, value) is not None]
    assert told[0] == 20
    assert told[-1] < 70


def test_losses_that_come_back_are_usual_and_a_broken_batch_is_not():
    """A first loss that is the lowest by luck says little of those after it."""
    jumps = LossJumps(AlertRules())
    lucky = [0.02, 0.07, 0.02, 0.2, 0.02, 0.4, 0.03, 0.02, 0.02, 0.36, 0.19, 0.1, 0.13]
    assert not any(found.sure for found in map(jumps.add, range(13), lucky) if found is not None)
    assert jumps.add(13, 1e6).excess > 1e5
    jumps.add(14, 0.03)
    assert jumps.add(15, 1e6).excess > 1e5


def test_groups_that_a_loaded_state_has_put_in_place_are_followed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, 10, optimizer=optimizer) as monitor:
        optimizer.load_state_dict(optimizer.state_dict())
        for step in range(40):
            optimizer.param_groups[0]["lr"] = 0.01 if step < 30 else 300.0
            optimizer.zero_grad()
            loss = (model(torch.randn(16, 8)) - 1.0).square().mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert "jumped at training step 30 from 0.01 to 300" in monitor.findings[0].evidence
