"""A rate that the loss does not bear is said before the loss blows up, and healthy runs are left in peace."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stabkit import plotting
from stabkit.errors import ArgumentError
from stabkit.monitor import Monitor, read_records
from tests.monitor.divergences import CharacterGPT, CharacterLSTM, Digits, characters, digits
from tests.monitor.networks import mlp, weights
from tests.monitor.runs import all_digits
from tests.monitor.test_alerts import two_classes

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
MOMENTUM = partial(SGD, momentum=0.9)


class Flat(nn.Sequential):
    def __init__(self, act=nn.Tanh, dropout=0.0):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 48), act(), nn.Dropout(dropout), nn.Linear(48, 48), act(), nn.Linear(48, 10)
        )


def constant(rate):
    return lambda step: rate


def jump(low, high):
    return lambda step: low if step < 20 else high


def climb(low, high):
    return lambda step: low * (high / low) ** (min(step, 60) / 60)


gpt, lstm = partial(CharacterGPT, 24, 2), partial(CharacterLSTM, 24, 2)
BLOWING_UP = {
    "too high from the start": (Flat, digits, SGD, constant(60.0)),
    "convolutions": (Digits, digits, SGD, constant(3.0)),
    "momentum, a jump": (Flat, digits, MOMENTUM, jump(0.05, 6.0)),
    "Adam, a jump": (Flat, digits, ADAM, jump(1e-3, 1.0)),
    "Adam from the start": (Flat, digits, ADAM, constant(2.0)),
    "transformer, a jump": (gpt, characters, ADAM, jump(1e-3, 1.0)),
    "LSTM, a jump": (lstm, characters, ADAM, jump(1e-3, 3.0)),
    "transformer, a climb": (gpt, characters, MOMENTUM, climb(0.01, 20.0)),
}
HEALTHY = {
    "small rate": (Flat, digits, SGD, constant(0.1)),
    "at the edge": (partial(Flat, nn.ReLU), digits, SGD, constant(0.3)),
    "momentum": (Flat, digits, MOMENTUM, constant(0.05)),
    "Adam, dead units": (partial(Flat, nn.ReLU, 0.3), digits, ADAM, constant(2e-3)),
    "RMSprop": (Flat, digits, torch.optim.RMSprop, constant(1e-3)),
    "convolutions": (Digits, digits, ADAM, constant(2e-3)),
    "transformer": (gpt, characters, ADAM, constant(2e-3)),
    "a slow warm-up": (Flat, digits, MOMENTUM, climb(1e-3, 0.1)),
}


def trained(build, data, kind, rate, steps):
    """The monitor, and the step at which the loss was ten times its start or not finite."""
    torch.manual_seed(0)
    model, draw = build(), data()
    x, y = (torch.cat(parts) for parts in zip(*(draw() for _ in range(4)), strict=True))
    optimizer = kind(model.parameters(), lr=rate(0))
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    first = math.nan
    with Monitor(model, 10, optimizer=optimizer, closure=closure, sharpness_every=20) as monitor:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate(step)
            inputs, targets = draw()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            first = loss.item() if step == 0 else first
            if not loss.item() <= 10 * first:
                return monitor, step
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor, None


@pytest.mark.parametrize("name", BLOWING_UP)
def test_it_is_said_before_the_loss_blows_up(name):
    monitor, end = trained(*BLOWING_UP[name], 100)
    assert end is not None
    said = next(f for f in monitor.findings if f.kind == "unstable_update")
    numbers = said.numbers
    assert numbers["training_step"] < end
    assert numbers["learning_rate"] > numbers["lower_to"] > 0
    assert f"{numbers['learning_rate']:.4g}" in said.evidence
    assert f"{numbers['largest_stable_lr']:.3g}" in said.evidence


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_in_peace(name):
    monitor, end = trained(*HEALTHY[name], 90)
    assert end is None
    assert monitor.findings == []
    assert sum(record.look is not None for record in monitor.records) >= 5


def full_batches(kind, rate, steps, **options):
    torch.manual_seed(0)
    model = Flat(nn.ReLU)
    x, y = all_digits()()
    optimizer = kind(model.parameters(), lr=rate(0))
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    losses = []
    with Monitor(model, 1, optimizer=optimizer, closure=closure, **options) as monitor:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            loss = closure()
            losses.append(loss.item())
            if losses[-1] > 10 * losses[0]:
                break
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor, losses


def test_full_batches_whose_ratio_is_beyond_three_at_the_edge_hear_nothing():
    monitor, losses = full_batches(SGD, constant(0.527), 60, sharpness_every=2)
    assert max(record.look.ratio for record in monitor.records if record.look is not None) > 3.0
    assert losses[-1] < 0.1 * losses[0]
    assert monitor.findings == []


def test_a_rate_that_jumps_below_the_edge_of_now_is_tried():
    """The curvature of where the weights are bears it, and that of where it takes them does not."""
    monitor, losses = full_batches(MOMENTUM, jump(0.07, 1.45), 40)
    assert 20 <= monitor.findings[0].numbers["training_step"] < len(losses) - 1
    look = monitor.records[20].look
    assert look is not None
    assert look.ratio < 1.0 < max(look.found.trial) / look.found.loss
    assert losses[-1] > 10 * losses[0]


class Bowl(nn.Module):
    """Half the sum of curvature theta^2."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(20))
        self.register_buffer("curvature", torch.linspace(0.1, 4.0, 20))

    def forward(self):
        return (self.curvature * self.theta.square()).sum() / 2


@pytest.mark.parametrize("times", [0.97, 1.03])
def test_on_a_bowl_it_is_told_while_the_loss_still_falls(times):
    bowl = Bowl()
    sgd = SGD(bowl.parameters(), lr=times * 0.5)
    with Monitor(bowl, 1, optimizer=sgd, closure=bowl, blocks=[""]) as monitor:
        for _ in range(24):
            sgd.zero_grad()
            loss = bowl()
            loss.backward()
            monitor.step(loss)
            sgd.step()
    if times < 1:
        assert monitor.findings == []
        return
    (found,) = monitor.findings
    at = int(found.numbers["training_step"])
    assert monitor.records[at].loss < monitor.records[0].loss
    assert found.numbers["lower_to"] < 0.5
    assert "with which the same trial does not raise the loss" in found.remedy


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_the_first_update_of_a_preconditioner_is_told_where_it_does_harm(kind):
    scale = 10.0 if kind is not torch.optim.RMSprop else 1.0
    monitor, end = trained(partial(Flat, nn.ReLU), digits, kind, constant(0.005 * scale), 10)
    assert end is None
    assert monitor.findings == []
    assert monitor.records[0].look.ratio > 3.0  # for one update only
    monitor, end = trained(partial(Flat, nn.ReLU), digits, kind, constant(0.05 * scale), 10)
    assert end is not None
    assert monitor.findings[0].numbers["training_step"] == 0


def test_a_jump_is_said_at_its_own_step():
    monitor, _ = trained(*BLOWING_UP["momentum, a jump"], 100)
    assert monitor.findings[0].numbers["training_step"] == 20


def run(model, tmp_path, closure=True):
    torch.manual_seed(0)
    draw = two_classes(16)
    x, y = draw()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"closure": lambda: nn.functional.cross_entropy(model(x), y), "sharpness_every": 4} if closure else {}
    writers = [tmp_path / "run.jsonl", tmp_path / "run.csv"]
    with Monitor(model, 2, optimizer=optimizer, writers=writers, **options) as monitor:
        for _ in range(9):
            inputs, targets = draw()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor


def test_training_is_the_same_bit_for_bit(tmp_path):
    found = []
    for closure in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(mlp(16, 2, dropout=0.3)[:-1], nn.BatchNorm1d(16), nn.Linear(16, 2))
        run(model, tmp_path / str(closure), closure)
        found.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_records_writers_and_pictures_have_it(tmp_path):
    monitor = run(mlp(16, 2), tmp_path)
    looks = [record.look for record in monitor.records if record.look is not None]
    assert [look.step for look in looks] == [0, 2, 4, 8]  # of the looks at 1 and 2 the newer
    scalars = monitor.records[0].scalars()
    assert scalars["sharpness_ratio"] == looks[0].found.ratio
    assert scalars["learning_rate"] == 0.1
    for name in ("run.jsonl", "run.csv"):
        read = [record["sharpness"] for record in read_records(tmp_path / name)]
        assert [float(look["ratio"]) for look in read if look] == [look.found.ratio for look in looks]
        ax = plotting.training(read_records(tmp_path / name), quantity="sharpness_ratio")
        assert "bears" in ax.get_title()
    assert monitor.plot(quantity="sharpness_ratio").get_yscale() == "log"
    with pytest.raises(ArgumentError, match="the records hold no sharpness"):
        plotting.training(run(mlp(16, 2), tmp_path / "b", closure=False), quantity="sharpness_ratio")


def test_a_table_that_is_continued_keeps_its_columns(tmp_path):
    run(mlp(16, 2), tmp_path)
    path = tmp_path / "run.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    at = lines[0].index("sharpness")
    older = [[*line[:at], *line[at + 4 :]] for line in lines]  # as it was before sharpness
    path.write_text("".join(",".join(line) + "\n" for line in older))
    run(mlp(16, 2), tmp_path)
    read = read_records(path)
    assert len(read) == 10
    assert read[-1]["sharpness"] is None
    assert float(read[-1]["blocks"][0]["activation_norm"]) > 0


def test_it_needs_one_optimizer():
    model = mlp(16, 2)
    with pytest.raises(ArgumentError, match="optimizer= holds 0"):
        Monitor(model, closure=lambda: model(torch.ones(2, 16)).sum())


def test_a_closure_that_fails_does_not_stop_the_run():
    model = mlp(16, 2)
    sgd = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, 1, optimizer=sgd, closure=lambda: model(torch.ones(2, 3)).sum())

    def train():
        for _ in range(3):
            model(torch.ones(2, 16)).sum().backward()
            monitor.step()
            sgd.step()

    with pytest.warns(RuntimeWarning, match="the sharpness failed at step 0 and is off"):
        train()
    assert len(monitor.records) == 3


def test_a_wrapper_that_waits_for_other_processes_is_not_called():
    """Forward calls of DistributedDataParallel exchange buffers and prepare a backward pass that would not come."""
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        sgd = SGD(wrapped.parameters(), lr=0.1)
        x = torch.randn(32, 16)
        closure = lambda: wrapped(x).square().mean()  # noqa: E731
        with Monitor(wrapped, 1, optimizer=sgd, closure=closure, sharpness_every=1) as monitor:
            for _ in range(4):
                sgd.zero_grad()
                closure().backward()
                monitor.step()
                sgd.step()
    finally:
        dist.destroy_process_group()
    assert all(record.look is not None for record in monitor.records)
    assert "forward" not in vars(wrapped)


@pytest.mark.parametrize("clipped", ["by torch", "by the monitor", "by value", "whole"])
def test_a_gradient_that_is_clipped_before_the_step_makes_the_ratio_smaller(clipped):
    torch.manual_seed(0)
    model = Flat()
    draw = digits()
    x, y = draw()
    optimizer = SGD(model.parameters(), lr=60.0)
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    with Monitor(model, 1, optimizer=optimizer, closure=closure, sharpness_every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if clipped == "by torch":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            elif clipped == "by the monitor":
                monitor.clip_grad_norm_(model.parameters(), 1e-2)
            elif clipped == "by value":
                nn.utils.clip_grad_value_(model.parameters(), 1e-5)
            monitor.step(loss)
            look = monitor.records[-1].look
            assert look.found.ratio > 3.0
            if clipped == "whole":
                assert look.shortened == 1.0
            elif clipped == "by value":
                assert look.shortened < 0.1
            else:
                assert look.shortened == pytest.approx(1e-2 / float(norm), rel=1e-3)
                assert look.ratio == look.found.ratio * look.shortened < 1.2
    assert [f.kind for f in monitor.findings] == (["unstable_update"] if clipped == "whole" else [])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("passed", [True, False])
def test_a_scale_that_is_taken_out_of_gradients_is_no_clipping(passed):
    torch.manual_seed(0)
    model = Flat()
    x, y = digits()()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    with Monitor(model, 1, optimizer=optimizer, closure=closure, sharpness_every=1, scaler=scaler) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(closure()).backward()
            if passed:
                scaler.unscale_(optimizer)
            monitor.step()
            assert monitor.records[-1].look.shortened == 1.0
            scaler.step(optimizer)
            scaler.update()


def test_a_warm_up_from_zero_leaves_the_sharpness_on():
    torch.manual_seed(0)
    model, draw = Flat(), digits()
    x, y = draw()
    optimizer = SGD(model.parameters(), lr=0.0, momentum=0.9)
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    with Monitor(model, 1, optimizer=optimizer, closure=closure) as monitor:
        for step in range(8):
            optimizer.param_groups[0]["lr"] = 0.01 * max(0, step - 2)
            inputs, targets = draw()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    looks = [record.look and record.look.step for record in monitor.records]
    assert looks[:4] == [None, None, None, 3]
    assert all(record.along is None for record in list(monitor.records)[:4])
    assert monitor.records[-1].along is not None  # and so do measurements without a closure


def test_layers_that_are_thawed_leave_the_sharpness_on():
    torch.manual_seed(0)
    model, draw = Flat(), digits()
    x, y = draw()
    model[1].requires_grad_(False)
    optimizer = ADAM([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    with Monitor(model, 1, optimizer=optimizer, closure=closure, sharpness_every=4) as monitor:
        for step in range(10):
            if step == 3:
                model[1].requires_grad_(True)
                optimizer.add_param_group({"params": list(model[1].parameters())})
            if step == 7:
                model[4].requires_grad_(False)
            inputs, targets = draw()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert monitor.findings == []
    assert [r.look.step for r in monitor.records if r.look is not None][-1] == 8
    assert [r.along.step for r in monitor.records if r.along is not None] == [1, 2, 4, 5, 6, 8]
