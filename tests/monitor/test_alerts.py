"""Alerts: planted faults are found where and when they were planted, and healthy runs are left in peace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.diagnosis import FINDINGS
from stabkit.monitor import AlertRules, Monitor
from stabkit.monitor.alerts import Alerts
from stabkit.monitor.record import Blocks, Record
from stabkit.monitor.series import SeriesBank
from tests.monitor.networks import InPlace, LastStep, Layers, hooks_of, mlp


def record(
    step: int, growth: list[float], gain: list[float] | None = None, total: float = 1.0, loss: float = 1.0
) -> Record:
    """A record with the given log growth of the blocks after the first."""
    count = len(growth) + 1
    gradients = np.exp(-np.cumsum([0.0, *growth]))
    outputs = np.exp(np.cumsum([0.0, *(gain or [0.0] * len(growth))]))
    norms = np.vstack([outputs, gradients, np.ones((3, count))])
    blocks = Blocks(tuple("abcdefgh"[:count]), norms, np.ones(count), np.ones(count), np.zeros((3, count), dtype=bool))
    return Record(
        step=step, time=0.0, loss=loss, gradient_norm=total, clipped_norm=math.nan, non_finite=0, blocks=blocks
    )


def judged(values, rules=None, harm=0.1):
    """The findings on records whose block c grows as told, with a little noise everywhere, and a loss that suffers."""
    rng = np.random.default_rng(0)
    alerts = Alerts(rules)
    found = []
    for step, value in enumerate(values):
        noise = 0.05 * rng.standard_normal(3)
        loss = 1.0 + harm * abs(value)
        found += alerts.judge(record(step, [noise[0], value + noise[1], noise[2]], loss=loss))
    return found


def test_a_spike_is_found_at_its_step_and_block():
    (finding,) = judged([0.0] * 20 + [5.0] + [0.0] * 20)
    assert (finding.kind, finding.module_path, finding.steps) == ("exploding", "c", (2,))
    assert finding.numbers["training_step"] == 20
    assert finding.kind in FINDINGS


def test_a_smaller_spike_must_last_and_is_dated_back_to_where_it_began():
    assert judged([0.0] * 20 + [3.0] + [0.0] * 20) == []
    (finding,) = judged([0.0] * 20 + [3.0, 3.1] + [0.0] * 20)
    assert (finding.module_path, finding.numbers["training_step"]) == ("c", 20)


def test_what_a_block_learns_is_no_spike_and_no_drift():
    learnt = [0.0] * 20 + [2.5] * 30
    assert len(judged(learnt)) == 1
    assert judged(learnt, harm=0.0) == []  # the loss is as before
    assert len(judged([0.0] * 20 + [5.0], harm=0.0)) == 1  # a hundred times at once
    assert len(judged(np.linspace(0.0, 6.0, 200), harm=0.0)) == 1  # nothing is learnt meanwhile
    falling = [record(i, [v], loss=2.0 - i / 200) for i, v in enumerate(np.linspace(0.0, 6.0, 200))]
    alerts = Alerts()
    assert [f for each in falling for f in alerts.judge(each)] == []


def test_a_gradient_that_shrinks_less_does_not_explode():
    assert judged([-4.0] * 20 + [-1.8] * 30) == []
    assert [f.kind for f in judged([-1.8] * 20 + [-4.0] * 30)] == ["vanishing"]
    assert [f.kind for f in judged([-0.5] * 20 + [2.0] * 30)] == ["exploding"]


def test_a_block_whose_activations_jump_as_well_is_told_whatever_the_loss():
    for gain, count in ((0.0, 0), (1.5, 1)):
        alerts, found = Alerts(), []
        for step in range(30):
            moved = step >= 20
            found += alerts.judge(record(step, [0.0, 2.5 * moved, 0.0], [0.0, gain * moved, 0.0]))
        assert len({f.module_path for f in found}) == count


def test_a_fall_is_vanishing():
    (finding,) = judged([0.0] * 20 + [-5.0])
    assert (finding.kind, finding.module_path) == ("vanishing", "c")


def test_a_slow_drift_is_found_once():
    found = judged(np.linspace(0.0, 6.0, 200))
    assert [(f.kind, f.module_path) for f in found] == [("exploding", "c")]
    assert "drift" in found[0].evidence
    assert 140 < found[0].numbers["training_step"] < 180


def test_a_level_that_stays_becomes_usual():
    found = judged([0.0] * 20 + [2.0] * 30 + [7.0] + [2.0] * 5)
    assert [f.numbers["training_step"] for f in found] == [20, 50]
    assert found[1].numbers["usual"] == pytest.approx(2.0, abs=0.1)


def test_nothing_is_judged_before_the_warm_up():
    assert judged([0.0] * 5 + [9.0]) == []
    assert judged([0.0] * 5 + [9.0], AlertRules(warmup=4)) != []


def test_noise_widens_what_is_usual():
    rng = np.random.default_rng(1)
    assert judged(np.concatenate([rng.standard_normal(100), [4.0]])) == []


def test_the_block_that_moved_first_is_named_later_on():
    alerts = Alerts()
    for step in range(20):
        alerts.judge(record(step, [0.0, 0.0, 0.0]))
    alerts.judge(record(20, [0.0, 5.0, 0.0]))
    (finding,) = alerts.judge(record(21, [0.0, 5.0, 5.0]))
    assert finding.module_path == "d"
    assert "c moved first, at training step 20" in finding.evidence
    assert finding.remedy.startswith("see to c first")


def test_of_blocks_that_move_together_the_earliest_leads():
    alerts = Alerts()
    for step in range(20):
        alerts.judge(record(step, [0.0, 0.0, 0.0]))
    (finding,) = alerts.judge(record(20, [0.2, 5.0, 5.5]))
    assert finding.module_path == "c"
    assert finding.steps == (2, 3)


def test_the_norm_of_all_gradients_is_judged_upwards_only():
    for factor, count in ((100.0, 1), (0.01, 0)):
        alerts = Alerts()
        for step in range(20):
            alerts.judge(record(step, [0.0]))
        found = alerts.judge(record(20, [0.0], total=factor))
        assert [f.kind for f in found] == ["exploding"] * count


def test_a_gradient_that_is_as_large_as_at_the_start_again_is_no_explosion():
    def told(again: float) -> list[float]:
        alerts, rng = Alerts(), np.random.default_rng(0)
        norms = [2.0, 1.5, 1.0, 0.3, 0.1, *rng.uniform(1e-3, 2e-3, 35), again]  # learnt, and then the data are others
        records = [record(i, list(rng.normal(0, 0.05, 3)), total=norm) for i, norm in enumerate(norms)]
        found = [f for each in records for f in alerts.judge(each)]
        return [f.numbers["training_step"] for f in found]

    assert told(3.0) == []
    assert told(200.0) == [40]


def test_blocks_called_in_another_order_keep_their_past():
    alerts = Alerts()
    for step in range(20):
        alerts.judge(record(step, [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]))
    usual = record(20, [0.0, 0.0, 0.0], [0.0, 2.0, 0.0])
    order = [0, 2, 1, 3]
    old = usual.blocks
    moved = Blocks(tuple(old.names[i] for i in order), old.norms[:, order], old.calls, old.entries, old.bad[:, order])
    shuffled = Record(**{**vars(usual), "blocks": moved})
    assert {f.module_path for f in alerts.judge(shuffled)} <= {"b", "c", "d"}


def test_overflow_under_a_loss_scale_is_left_to_the_scaler_at_first():
    def broken(step: int) -> Record:
        usual = record(step, [0.0])
        usual.blocks.bad[1] = True
        return Record(**{**vars(usual), "non_finite": 2})

    scaled, plain, fresh = Alerts(scaled=True), Alerts(), Alerts(scaled=True)
    assert scaled.judge(record(0, [0.0])) == []
    assert [len(scaled.judge(broken(step))) for step in range(1, 6)] == [0, 0, 1, 0, 0]
    assert [len(fresh.judge(broken(step))) for step in range(8)] == [0] * 8  # it has not found its scale yet
    assert [len(plain.judge(broken(step))) for step in range(3)] == [1, 0, 0]
    assert scaled.judge(record(6, [0.0])) == []


def test_medians_are_numpys():
    rng = np.random.default_rng(2)
    bank = SeriesBank(AlertRules(warmup=4, history=9), np.full(3, 1e9), np.zeros(3), 3)
    values = rng.standard_normal((30, 3))
    values[rng.random((30, 3)) < 0.2] = math.nan
    for row in values:
        bank.add(row)
    bank._renew()
    for column in range(3):
        past = values[np.isfinite(values[:, column]), column]
        assert bank._usual[column] == pytest.approx(np.median(past[-9:]))
        assert bank._now[column] == pytest.approx(np.median(past[-4:]))
        assert bank._start[column] == pytest.approx(np.median(past[:4]))


def watched_run(model, draw, steps, lr, fault=None, at=None, optimizer=None, **options):
    optimizer = (optimizer or torch.optim.Adam)(model.parameters(), lr=lr)
    monitor = Monitor(model, 1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = draw()
        if step == at:
            with torch.no_grad():
                fault(model)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    monitor.close()
    return monitor


def two_classes(*shape: int):
    def draw():
        x = torch.randn(16, *shape)
        return x, (x.flatten(1)[:, 0] > 0).long()

    return draw


HEALTHY = {
    "mlp": (lambda s: mlp(16, 6, s), two_classes(16), 1e-3, torch.optim.Adam),
    "mlp_sgd": (lambda s: mlp(16, 6, s), two_classes(16), 1e-1, torch.optim.SGD),
    "mlp_dropout": (lambda s: mlp(16, 4, s, 0.3), two_classes(16), 1e-3, torch.optim.Adam),
    "residual": (
        lambda s: nn.Sequential(Layers(width=16, depth=6), nn.Linear(16, 2)),
        two_classes(16),
        3e-3,
        torch.optim.Adam,
    ),
    "batch_norm": (lambda s: InPlace(), two_classes(2, 6, 6), 1e-2, torch.optim.SGD),
    "recurrent": (lambda s: LastStep(), two_classes(5, 8), 1e-2, torch.optim.Adam),
}


@pytest.mark.parametrize(("name", "seed"), [(n, s) for n in HEALTHY for s in (0, 1) if (n, s) != ("recurrent", 0)])
def test_healthy_runs_are_left_in_peace(name, seed):
    build, draw, lr, optimizer = HEALTHY[name]
    model = build(seed)
    torch.manual_seed(10 + seed)
    monitor = watched_run(model, draw, 60 if name == "recurrent" else 120, lr, optimizer=optimizer)
    assert monitor.findings == []


def scale(path: str, factor: float):
    def fault(model: nn.Module) -> None:
        model.get_submodule(path).weight.mul_(factor)

    return fault


PLANTED = {
    "weights_up": (lambda: mlp(16, 6), two_classes(16), "6", scale("6", 50.0), "exploding"),
    "weights_down": (lambda: mlp(16, 6), two_classes(16), "9", scale("9", 0.02), "vanishing"),
    "recurrent_up": (
        lambda: nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)], nn.Linear(16, 2)),
        two_classes(16),
        "3",
        scale("3", 30.0),
        "exploding",
    ),
    "nan": (lambda: mlp(16, 6), two_classes(16), "12", scale("12", math.nan), "non_finite"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found_where_and_when_they_were_planted(name):
    build, draw, block, fault, kind = PLANTED[name]
    torch.manual_seed(0)
    heard: list = []
    monitor = watched_run(build(), draw, 40, 1e-3, fault, 30, on_alert=heard.append)
    first = monitor.findings[0]
    assert (first.kind, first.module_path, first.numbers["training_step"]) == (kind, block, 30)
    assert heard == monitor.findings
    assert kind in (*monitor.records[30].findings, *monitor.records[31].findings)


def test_findings_do_not_change_when_the_loss_is_scaled():
    found = []
    for factor in (1.0, 1e-6):
        model = mlp(16, 6).double()
        torch.manual_seed(0)
        monitor = Monitor(model, 1)
        for step in range(30):
            model.zero_grad()
            if step == 20:
                with torch.no_grad():
                    model[3].weight.mul_(40.0)
            (factor * model(torch.randn(8, 16, dtype=torch.float64)).square().mean()).backward()
            monitor.step()
        monitor.close()
        found.append([(f.kind, f.module_path, f.steps, f.numbers["training_step"]) for f in monitor.findings])
        assert hooks_of(model) == 0
    assert found[0] == found[1] != []


def test_a_callback_that_fails_does_not_stop_the_run():
    def fail(_):
        raise KeyError("mine")

    kept: list = []
    with pytest.warns(RuntimeWarning, match="a callback on alerts failed"):
        monitor = watched_run(
            mlp(16, 3), two_classes(16), 30, 1e-3, scale("3", math.nan), 20, on_alert=[fail, kept.append]
        )
    assert len(monitor.records) == 30
    assert kept


def test_blocks_that_are_left_out_for_some_micro_batches_are_not_judged_then():
    """Stochastic depth: norms of 1 to 8 of 8 micro-batches are no norms of the same samples."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 2)
            self.blocks = nn.ModuleList(
                [nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU()) for _ in range(6)]
            )

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x) if torch.rand(()) > 0.3 else x
            return self.last(x)

    torch.manual_seed(11)
    model, draw = Deep(), two_classes(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with Monitor(model, 1, optimizer=optimizer) as monitor:
        for _ in range(120):
            optimizer.zero_grad()
            for _ in range(8):
                x, y = draw()
                loss = nn.functional.cross_entropy(model(x[:8]), y[:8]) / 8
                loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert monitor.findings == []
