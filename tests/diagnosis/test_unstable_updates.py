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
    assert any("no harm was measured" in note and "at lower rates" in note for note in report.training.notes)
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


def sequences(n=32, length=8):
    y = torch.randint(0, 4, (n,))
    x = torch.randint(0, 40, (n, length))
    return torch.where(torch.rand(n, length) < 0.5, 40 + 10 * y[:, None] + torch.randint(0, 10, (n, length)), x), y


class PostNorm(nn.Module):
    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
        self.table, self.head = nn.Embedding(80, 32), nn.Linear(32, 4)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.layers(self.table(x)).mean(1))


def regression(n=64):
    x = torch.randn(n, 6)
    return x, x[:, :1].sin() + x[:, 1:2] * x[:, 2:3]


def perceptron(activation, depth, outputs):
    layers = [m for _ in range(depth) for m in (nn.LazyLinear(64), activation())]
    return nn.Sequential(*layers, nn.LazyLinear(outputs))


def fitted(build, data, optimizer):
    torch.manual_seed(0)
    x, y = data()
    model = build()
    model(x)
    loss = functional.cross_entropy if y.dim() == 1 else functional.mse_loss
    return model, x, y, optimizer(model.parameters()), loss


RUINED = {
    "post-norm": (PostNorm, sequences, lambda p: torch.optim.Adam(p, lr=8e-2)),
    "post-norm with decay": (PostNorm, sequences, lambda p: torch.optim.AdamW(p, lr=8e-2)),
    "classifier": (lambda: perceptron(nn.ReLU, 4, 4), lambda: batch((16,), 64), lambda p: torch.optim.Adam(p, lr=0.4)),
    "regression": (lambda: perceptron(nn.ReLU, 3, 1), regression, lambda p: torch.optim.Adam(p, lr=0.16)),
    "saturated": (lambda: perceptron(nn.Tanh, 5, 1), regression, lambda p: torch.optim.Adam(p, lr=0.05)),
}
HIGH_BUT_WELL = {
    "pre-norm": (lambda: PostNorm(norm_first=True), sequences, lambda p: torch.optim.Adam(p, lr=2e-2)),
    "post-norm": (PostNorm, sequences, lambda p: torch.optim.Adam(p, lr=2e-3)),
    "batch norms": (convolutions, lambda: batch((1, 8, 8)), lambda p: torch.optim.Adam(p, lr=5e-2)),
    "recurrent": (Recurrent, lambda: batch((6, 4)), lambda p: torch.optim.RMSprop(p, lr=3e-2)),
    "regression": (lambda: perceptron(nn.ReLU, 3, 1), regression, lambda p: torch.optim.Adam(p, lr=2e-2)),
}


@pytest.mark.parametrize("name", RUINED)
def test_a_rate_that_leads_to_a_constant_output_is_told_beside_lower_ones_that_learn(name):
    model, x, y, optimizer, loss = fitted(*RUINED[name])
    (found,) = told(analysed(model, x, y, optimizer, loss=loss))
    assert found.severity == "warning"
    proposed = found.numbers["proposed_rate"]
    assert proposed < optimizer.param_groups[0]["lr"]
    assert f"{proposed:.3g}" in found.remedy
    # the promise: with the proposed rate the loss falls far below what the best constant output leaves
    optimizer.param_groups[0]["lr"] = proposed
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
    assert float(loss(model(x), y).detach()) < 0.5 * found.numbers["loss"]


@pytest.mark.parametrize("name", HIGH_BUT_WELL)
def test_high_rates_that_train_as_well_are_silent(name):
    model, x, y, optimizer, loss = fitted(*HIGH_BUT_WELL[name])
    assert told(analysed(model, x, y, optimizer, loss=loss)) == []


def test_noise_of_a_loss_that_has_been_learnt_is_not_held_against_a_rate():
    model, x, y, optimizer, loss = fitted(lambda: perceptron(nn.ReLU, 3, 1), regression, RUINED["regression"][2])
    for step in range(300):
        if step > 100 and step % 50 == 0:
            report = analysed(model, x, y, optimizer, loss=loss)
            run = report.training.updates[0].losses if report.training.updates else (1.0, 0.0)
            assert told(report) == [] or run[-1] > run[0]
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.01
