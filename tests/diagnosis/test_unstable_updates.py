"""A rate above the largest stable one is told where real updates raise the loss; healthy settings are silent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.into, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(self.into(x)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


MODELS = {"mlp": (mlp, (4,)), "cnn": (convolutions, (1, 8, 8)), "lstm": (Recurrent, (6, 4)), "tf": (Attention, (6, 4))}
RATES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
}


def batch(shape, n=24):
    x = torch.randn(n, *shape)
    return x, x.flatten(1)[:, :3].argmax(1)


def analysed(model, x, y, optimizer, **options):
    loss = options.pop("loss", functional.cross_entropy)
    return stabkit.analyze(model, x, loss=lambda out: loss(out, y), optimizer=optimizer, spectrum="none", **options)


def told(report):
    return [f for f in report.findings if f.kind == "unstable_update"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rate", RATES)
def test_usual_rates_are_silent_at_first_and_later(name, rate):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().train()
    optimizer = RATES[rate](model.parameters())
    for steps in (0, 2, 60):
        for _ in range(steps):
            x, y = batch(shape)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        report = analysed(model, *batch(shape), optimizer)
        assert told(report) == []
        assert report.training.learning_rate == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("optimizer", "severity"),
    [
        (lambda p: torch.optim.SGD(p, lr=30.0), "critical"),
        (lambda p: torch.optim.SGD(p, lr=30.0, momentum=0.9), "critical"),
        (lambda p: torch.optim.Adam(p, lr=3.0), None),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_rates_that_are_far_too_large_are_told_with_both_losses(optimizer, severity):
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    y = x[:, :1].sin()
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    report = analysed(model, x, y, optimizer(model.parameters()), loss=functional.mse_loss)
    (found,) = told(report)
    assert severity in (None, found.severity)
    present, proposed = report.training.updates
    assert f"take the loss from {present.losses[0]:.3g}" in found.evidence
    assert f"to {proposed.losses[-1]:.3g} at a rate of {proposed.rate:.3g}" in found.evidence
    assert f"to {proposed.rate:.3g}" in found.remedy
    assert proposed.losses[-1] < present.losses[0]
    assert not present.losses[-1] < present.losses[0]
    # the promise: with the proposed rate nothing is left to tell, and training lowers the loss
    chosen = optimizer(model.parameters())
    chosen.param_groups[0]["lr"] = proposed.rate
    assert told(analysed(model, x, y, chosen, loss=functional.mse_loss)) == []
    for _ in range(20):
        chosen.zero_grad()
        value = functional.mse_loss(model(x), y)
        value.backward()
        chosen.step()
    assert float(functional.mse_loss(model(x), y).detach()) == pytest.approx(proposed.losses[-1], rel=0.05)


def test_a_ratio_above_one_that_does_no_harm_is_no_finding():
    torch.manual_seed(0)
    model = mlp()
    x, y = batch((4,))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):  # the preconditioner is young
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.state[model[2].weight]["exp_avg_sq"].mul_(1e-6)  # as where a layer woke up late
    report = analysed(model, x, y, optimizer)
    assert report.training.ratio > 1.5
    assert told(report) == []
    assert any("no harm that was measured" in note for note in report.training.notes)
    assert report.training.updates[0].losses[-1] < report.training.loss


def test_full_batch_training_that_hovers_at_the_edge_of_stability_is_silent():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    y = x[:, :1].sin() + x[:, 1:2].square()
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ratios = []
    for step in range(601):
        if step and step % 150 == 0:
            report = analysed(model, x, y, optimizer, loss=functional.mse_loss)
            assert told(report) == []
            ratios.append(report.training.ratio)
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    assert max(ratios) > 0.8


def test_verdicts_of_updates_do_not_change_with_the_unit_of_the_loss():
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch((4,))
    by = 1e-3
    plain = analysed(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1))
    larger = torch.optim.SGD(model.parameters(), lr=0.1 / by)
    scaled = analysed(model, x, y, larger, loss=lambda out, y: by * functional.cross_entropy(out, y))
    assert scaled.training.ratio == pytest.approx(plain.training.ratio, rel=1e-2)
    assert math.isclose(scaled.training.largest_stable_rate * by, plain.training.largest_stable_rate, rel_tol=1e-2)
