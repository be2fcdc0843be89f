"""Inputs that change nothing are told where parameters were made for them; all others are silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs import unused
from stabkit.tracing.recording.evaluation import evaluated

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
CLASSES, TIMES = torch.arange(16) % 4, torch.linspace(0, 1, 16)[:, None]


def found(model: nn.Module, x: Tensor, loss: Callable[..., Tensor], **others: Tensor) -> list[Finding]:
    said = stabkit.diagnose(stabkit.trace(model, x, kwargs=others), loss)
    return [f for f in said if f.kind == "no_influence"]


class Conditioned(nn.Module):
    """A layer with a class and a time beside its input, which are used as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.how = nn.Embedding(4, 6), nn.Linear(1, 6), how
        self.f = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        if self.how == "never":
            return self.f(x)
        embedded, time = self.embed(c), self.time(t)
        if self.how == "of the class alone":
            return self.f(x + embedded)
        return self.f(x + embedded + time) if self.how == "used" else self.f(x)


NEVER = "nothing is done with it, and nothing with embed.weight, time.weight, time.bias"


@pytest.mark.parametrize(
    ("how", "of_class", "of_time"),
    [
        ("made and dropped", "it goes into embed.weight, whose", "it goes into time.weight, time.bias, whose"),
        ("never", NEVER, NEVER),
    ],
)
def test_conditions_that_change_nothing_are_told_with_what_was_made_for_them(how: str, of_class: str, of_time: str):
    told = found(Conditioned(how), X, lambda out: out.square().mean(), c=CLASSES, t=TIMES)
    assert [f.severity for f in told] == ["warning", "warning"]
    by_input = {f.evidence[:13]: f.evidence for f in told}
    assert by_input.keys() == {"the input 'c'", "the input 't'"}
    assert of_class in by_input["the input 'c'"]
    assert of_time in by_input["the input 't'"]


def test_of_two_conditions_the_one_that_changes_nothing_is_told():
    model = Conditioned("of the class alone")
    (told,) = found(model, X, lambda out: out.square().mean(), c=CLASSES, t=TIMES)
    assert told.evidence.startswith("the input 't' differs between samples and changes nothing")
    assert told.evidence.endswith("it goes into time.weight, time.bias, whose results are not used")
    assert told.module_path == "time"
    assert "add it to a state" in told.remedy
    out, other = model(X, CLASSES, TIMES), model(X, CLASSES, TIMES.roll(1, 0))
    assert torch.equal(out, other)


def test_conditions_that_matter_or_are_the_same_for_all_raise_nothing():
    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    assert not found(Conditioned("used"), X, loss, c=CLASSES, t=TIMES)
    alike = {"c": torch.zeros(16, dtype=torch.long), "t": torch.full((16, 1), 0.5)}
    assert not found(Conditioned("made and dropped"), X, loss, **alike)

    class Ignoring(nn.Module):
        """Takes a time, as the right-hand side of an equation does, and nothing was made for it."""

        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 6)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.f(x).tanh()

    assert not found(Ignoring(), X, loss, t=TIMES)


def test_features_that_are_cut_off_are_a_fact():
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.f(torch.cat([x[:, :2], x[:, 4:5]], 1))

    (told,) = found(Sliced(), X, lambda out: out.square().mean())
    assert told.severity == "info"
    assert "(2 to 3, 5)" in told.evidence
    assert not found(nn.Linear(6, 2), X, lambda out: out.square().mean())


class Variational(nn.Module):
    """An autoencoder with a code that is drawn, times a factor."""

    def __init__(self, passed: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mean, self.log, self.passed = nn.Linear(6, 16), nn.Linear(16, 2), nn.Linear(16, 2), passed
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x).relu()
        mean, log = self.mean(h), self.log(h)
        return self.decoder(self.passed * (mean + (log / 2).exp() * torch.randn_like(mean))), mean, log


def bound(weight: float) -> Callable[[tuple[Tensor, Tensor, Tensor]], Tensor]:
    def loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        divergence = 0.5 * (out[1].square() + out[2].exp() - 1 - out[2]).sum(1).mean()
        return functional.mse_loss(out[0], X) + weight * divergence

    return loss


def test_a_reconstruction_that_ignores_the_code_is_none():
    (told,) = found(Variational(0.0), X, bound(0.01))
    assert told.severity == "warning"
    assert "does not depend on it at all" in told.evidence
    assert not found(Variational(), X, bound(0.01))
    assert not found(Variational(), X, bound(50.0))  # nothing has been learnt yet


def test_a_posterior_that_was_pressed_onto_its_prior_is_told():
    model, loss = Variational(), bound(50.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
    (told,) = found(model, X, loss)
    assert told.severity == "warning"
    assert told.numbers["by_input"] < 1e-3 * told.numbers["by_noise"]
    assert "KL warm-up" in told.remedy


def test_a_target_that_is_given_along_need_not_change_the_output():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = self.f(x)
            return functional.mse_loss(out, y), out

    target = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))
    assert not found(Both(), X, lambda out: out[0], y=target)
    assert not found(Both(), X, lambda out: functional.mse_loss(out[1], target), y=target)


def test_an_output_that_is_held_against_something_else_may_be_a_constant():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    assert not found(model, X, lambda out: functional.mse_loss(out, X.flip(0)))


class Zeroed(nn.Module):
    """An autoencoder whose last layer begins at zero, or whose layer before lets nothing through at all."""

    def __init__(self, dead: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.last = nn.Linear(6, 16), nn.Linear(16, 6)
        with torch.no_grad():
            self.encoder.bias.fill_(-50.0) if dead else self.last.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x).relu())


def test_a_decoder_that_begins_at_zero_is_not_one_that_ignores_the_code():
    def loss(out: Tensor) -> Tensor:
        return functional.mse_loss(out, X)

    assert not found(Zeroed(dead=False), X, loss)
    (told,) = found(Zeroed(dead=True), X, loss)
    assert told.severity == "warning"


def test_the_call_as_it_is_runs_once_for_all_inputs(monkeypatch: pytest.MonkeyPatch):
    plain = 0

    def counted(call: Any, change: Any = None, *others: Any, **options: Any) -> Any:
        nonlocal plain
        plain += change is None
        return evaluated(call, change, *others, **options)

    monkeypatch.setattr(unused, "evaluated", counted)
    found(Conditioned("used"), X, lambda out: out.square().mean(), c=CLASSES, t=TIMES)
    assert plain == 1
