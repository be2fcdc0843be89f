"""What goes away with the remedy of another finding is told as what follows from it, whichever was found first."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Diagnosis, examine
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.suspects import Settings, suspected

LABELS = torch.arange(32) % 4
POINTS = torch.randn(32, 2, generator=torch.Generator().manual_seed(1)) + 2 * functional.one_hot(LABELS, 4)[:, :2]


def alarms(found: Diagnosis) -> list[str]:
    return [f.kind for f in found.findings if serious(f)]


class Constant(nn.Module):
    """All weights of all layers start at the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_a_rank_that_copies_lose_is_theirs():
    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out, LABELS)

    flow = stabkit.trace(Constant(), POINTS)
    assert {"copied_units", "rank_collapse"} <= set(alarms(suspected(flow, Settings(loss))))
    found = examine(flow, loss)
    assert alarms(found) == ["copied_units"]
    (follower,) = [f for f in found.findings if f.kind == "rank_collapse"]
    assert (follower.severity, follower.remedy, follower.actions) == ("info", "that of copied_units at a", ())
    assert "it is gone with the remedy of copied_units at a" in follower.evidence
    model = Constant()
    assert stabkit.diagnosis.apply(model, found.findings[0]) > 0
    states = model.a(POINTS).detach()
    assert int(torch.linalg.matrix_rank(states - states.mean(0))) == 2  # as many as the input has, and not one
    assert not alarms(suspected(stabkit.trace(model, POINTS), Settings(loss)))


class Factors(nn.Module):
    """Two embeddings of zeros, joined, before a layer without bias."""

    def __init__(self, width: int, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Embedding(20, width), nn.Embedding(20, width)
        self.fc1, self.fc2 = nn.Linear(2 * width, 32, bias=False), nn.Linear(32, 1)
        for table in (self.one, self.two):
            nn.init.zeros_(table.weight) if zero else nn.init.normal_(table.weight, std=0.1)

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(torch.cat([self.one(i), self.two(j)], 1)))).squeeze(-1)


USERS, FILMS = torch.arange(32) % 20, (7 * torch.arange(32)) % 20
STARS = 3 + torch.sin(USERS.float()) + torch.cos(FILMS.float())


def stars(out: Tensor) -> Tensor:
    return functional.mse_loss(out, STARS)


def test_nothing_that_comes_back_through_zeros_is_theirs():
    found = examine(stabkit.trace(Factors(8, True), USERS, FILMS), stars)
    assert alarms(found) == ["no_gradient"]
    assert found.verdict.name == examine(stabkit.trace(Factors(8, False), USERS, FILMS), stars).verdict.name


def autoencoder(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def test_a_fresh_sigmoid_at_the_end_is_no_collapse():
    data = torch.rand(32, 64, generator=torch.Generator().manual_seed(2))
    model = autoencoder((64, 64, 64, 16, 64, 64, 64, 64))
    found = examine(stabkit.trace(model, data), lambda out: functional.binary_cross_entropy(out, data))
    assert "rank_collapse" not in alarms(found)


def test_targets_beyond_a_sigmoid_are_told_once():
    data = 2 * torch.rand(32, 64, generator=torch.Generator().manual_seed(2)) - 1
    model = autoencoder((64, 64, 16, 64, 64))
    found = examine(stabkit.trace(model, data), lambda out: functional.mse_loss(out, data))
    assert alarms(found) == ["loss"]


def test_growth_from_one_space_to_another_in_one_step_is_not_judged():
    class Sure(nn.Module):
        """A classifier whose answers are nearly sure, without layers of its own."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(20 * torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w).log_softmax(1)

    found = examine(stabkit.trace(Sure(), POINTS), lambda out: functional.nll_loss(out, LABELS))
    assert found.verdict.name == "not judged"
    assert "vanishing" not in alarms(found)


def test_weights_that_were_all_started_small_are_drawn_anew_and_no_skips_are_asked_for():
    torch.manual_seed(0)
    widths = [12, 32, 24, 24, 24, 24, 32, 4]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.01) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    x, y = torch.randn(32, 12), torch.arange(32) % 4
    report = stabkit.analyze(model, x, loss=lambda out: nn.functional.cross_entropy(out, y), spectrum="none")
    (found,) = [f for f in report.findings if f.kind == "vanishing" and f.severity != "info"]
    assert found.evidence.startswith("all 7 matrices were started small: with a standard deviation of 0.0")
    assert found.remedy == "start all 7 matrices with the standard deviation sqrt(2 / fan-in), He's initialisation"
    assert [a["action"] for a in found.actions] == ["redraw"] * 7
