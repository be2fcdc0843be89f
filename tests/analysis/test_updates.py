"""What a report holds of an optimizer's updates, how it is printed and read back, and what is said to be missing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.report import terminal
from stabkit.report.page import report_page
from tests.curvature.test_twin import Once


def made(n=12):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)], nn.Linear(6, 3))
    x, y = torch.randn(n, 6), torch.randint(3, (n,))
    return model, x, lambda out: functional.cross_entropy(out, y)


def analysed(optimizer=None, **options):
    model, x, loss = made()
    chosen = None if optimizer is None else optimizer(model.parameters())
    return stabkit.analyze(model, x, loss=loss, optimizer=chosen, spectrum="none", **options), model, x, loss


def test_the_section_is_that_of_the_functions_behind_it():
    report, model, x, loss = analysed(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9))
    found = report.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    sharp = stabkit.sharpness(model, x, loss=loss, optimizer=optimizer)
    rate = stabkit.curvature.critical_rate(model, x, loss=loss, optimizer=optimizer)
    assert (found.optimizer, found.learning_rate) == ("SGD", 0.5)
    assert found.method == sharp.method.name
    assert found.curvature == pytest.approx(sharp.values[0], rel=1e-6)
    assert found.threshold == sharp.threshold == pytest.approx(7.6)
    assert found.ratio == pytest.approx(sharp.ratio, rel=1e-6)
    assert found.critical_rate == pytest.approx(rate.rate, rel=1e-6)
    assert (found.loss, found.loss_after) == (pytest.approx(rate.loss), pytest.approx(rate.loss_after))
    assert found.tableau["V"] == ((1.0, 0.9), (0.0, 0.9))
    assert sum(block.share for block in found.blocks) == pytest.approx(1.0)


def test_the_leading_block_is_joined_with_the_growth_behind_it():
    report, *_ = analysed(lambda p: torch.optim.SGD(p, lr=0.1))
    found, leading = report.training, report.training.blocks[0]
    place = max(step.index for step in report.steps if step.module_path == leading.name)
    behind = sum(step.growth for step in report.steps[place + 1 :])
    assert found.growth_behind == pytest.approx(behind)
    assert found.depth.startswith(f"{leading.name} holds {leading.share:.0%} of the largest curvature")
    assert place == len(report.steps) - 1 or f"{behind:+.2f} nats" in found.depth


def test_a_leading_block_that_is_no_step_is_said_to_be_none():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layers = nn.Parameter(torch.tensor(30.0)), nn.Sequential(nn.Linear(6, 6), nn.Tanh())

        def forward(self, x):
            return self.layers(x) + 0 * x + 9 * self.scale

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = stabkit.analyze(model, x, loss=lambda out: out.square().mean(), optimizer=optimizer).training
    assert found.blocks[0].name == ""
    assert "the model itself holds" in found.depth
    assert ("no step" in found.depth) == (found.growth_behind is None)


def test_without_an_optimizer_there_is_no_section():
    report, *_ = analysed()
    assert report.training is None
    assert "Coming updates" not in str(report)
    assert "Coming updates" not in report_page(report)


def test_the_section_is_printed_saved_and_read_back(tmp_path, capsys):
    from rich.console import Console

    report, *_ = analysed(lambda p: torch.optim.AdamW(p, lr=0.1))
    assert stabkit.Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert stabkit.Report.load(report.save(tmp_path / "report.json")).training == report.training
    terminal.show(report, Console(width=100))
    for text in (str(report), report_page(report), capsys.readouterr().out):
        assert "Coming updates" in text
        assert "AdamW" in text
        assert "Critical rate" in text
        assert "no threshold: optimizer AdamW has made no update" in text


def test_nothing_of_the_model_or_the_optimizer_is_changed():
    model, x, loss = made()
    model.append(nn.BatchNorm1d(3)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0, momentum=0.9)
    loss(model(x)).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads, random = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    first, second = (
        stabkit.analyze(model, x, loss=loss, optimizer=optimizer, spectrum="none").training for _ in range(2)
    )
    assert first == second
    assert not model.training
    assert "measured in training mode" in first.notes[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer.state_dict()["state"] == {}


def test_what_could_not_be_had_is_said():
    model, x, loss = made()
    notes = stabkit.analyze(
        model, x, loss=lambda out: loss(Once.apply(out)), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    ).training
    assert notes.curvature is None
    assert notes.critical_rate > 0
    assert "cannot be differentiated twice" in notes.notes[0]
    needs = torch.optim.LBFGS(model.parameters(), lr=0.1)
    found = stabkit.analyze(model, x, loss=loss, optimizer=needs, spectrum="none").training
    assert found.critical_rate is None
    assert [note.split(":")[0] for note in found.notes] == ["no threshold", "no critical rate"]


def test_an_optimizer_alone_or_of_another_model_is_refused():
    model, x, loss = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"no loss.*give loss= too"):
        stabkit.analyze(model, x, optimizer=optimizer)
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.optim\.Optimizer"):
        stabkit.analyze(model, x, loss=loss, optimizer="sgd")
    with pytest.raises(ArgumentError, match="not the model's"):
        stabkit.analyze(made()[0], x, loss=loss, optimizer=optimizer)
    with pytest.raises(ArgumentTypeError, match=r"torch\.nn\.Module"):
        stabkit.analyze(lambda x: model(x), x, loss=loss, optimizer=optimizer)


def test_the_largest_rate_to_come_stands_beside_the_largest_stable_one():
    model, x, loss = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 20)
    rate = optimizer.param_groups[0]["lr"]
    found = stabkit.analyze(model, x, loss=loss, optimizer=optimizer, scheduler=schedule, spectrum="none").training
    assert optimizer.param_groups[0]["lr"] == rate == found.learning_rate
    assert (found.largest_rate_ahead, found.steps_to_largest_rate) == (pytest.approx(0.5), 20)
    assert f"{0.5 / found.largest_stable_rate:.2g} times what is stable now" in found.schedule
    assert "the schedule climbs to 0.5 in 20 steps" in str(found) or "climbs to 0.5" in found.schedule
    untold = stabkit.analyze(model, x, loss=loss, optimizer=optimizer, spectrum="none").training
    assert untold.largest_rate_ahead is None
    assert any("scheduler= was not given" in note for note in untold.notes)


def test_a_schedule_of_another_optimizer_is_refused_before_the_analysis():
    model, x, loss = made()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.5) for _ in range(2))
    schedule = torch.optim.lr_scheduler.ConstantLR(first)
    with pytest.raises(ArgumentError, match="another optimizer"):
        stabkit.analyze(model, x, loss=loss, optimizer=second, scheduler=schedule)
    with pytest.raises(ArgumentError, match="no optimizer"):
        stabkit.analyze(model, x, loss=loss, scheduler=schedule)


def test_a_rate_in_doubt_is_told_to_be_that_of_the_whole_gradient():
    report, model, x, loss = analysed(lambda p: torch.optim.SGD(p, lr=60.0))
    size = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x)), list(model.parameters()))]).norm()
    assert any(f"whose norm is {float(size):.3g}" in note and "clipping" in note for note in report.training.notes)
    report, *_ = analysed(lambda p: torch.optim.SGD(p, lr=0.01))
    assert not any("clipping" in note for note in report.training.notes)
