"""States taken off the graph at every time step are told, with what that costs; other cuts in loops are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding

TIMES, WIDTH = 16, 24


def series() -> Tensor:
    return torch.randn(32, TIMES, 4, generator=torch.Generator().manual_seed(0))


class Cells(nn.Module):
    """A cell that is called once a time step, whose state goes through a function of the time before."""

    def __init__(self, cell: type[nn.Module], between: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.between = cell(4, WIDTH), nn.Linear(WIDTH, 2), between

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], self.between(t, h))
        return self.head(h)


class Stepwise(nn.Module):
    """An LSTM that is given one time step after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(4, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            out, state = self.lstm(x[:, t : t + 1], state)
            state = tuple(each.detach() for each in state)
        return self.head(out[:, -1])


class Bare(nn.Module):
    """A recurrence of parameters, with time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u, self.w = nn.Parameter(torch.randn(4, WIDTH) / 2), nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        h = x.new_zeros(x.shape[1], WIDTH)
        for each in x:
            h = torch.tanh(each @ self.u + h.data @ self.w)
        return self.head(h)


class WithoutGrad(nn.Module):
    """A cell under ``no_grad`` but for its last steps."""

    def __init__(self, last: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.last = nn.GRUCell(4, WIDTH), nn.Linear(WIDTH, 2), last

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), WIDTH)
        with torch.no_grad():
            for t in range(x.shape[1] - self.last):
                h = self.cell(x[:, t], h)
        for t in range(x.shape[1] - self.last, x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


def said(model: nn.Module, severity: str = "info") -> list[Finding]:
    x = series()
    labels = (x[:, 2, 0] > 0).long()
    report = stabkit.analyze(model, x, loss=lambda out: functional.cross_entropy(out, labels), spectrum="none")
    return [f for f in report.findings if f.severity != severity]


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (Cells(nn.GRUCell, lambda _, h: h.detach()), "by detach (test_"),
        (Cells(nn.RNNCell, lambda _, h: h.clone().detach_()), "by detach_ (test_"),
        (Stepwise(), "by detach (test_"),
        (Bare(), "by .data (test_"),
        (WithoutGrad(1), "15 of 16 time steps run under no_grad (test_"),
    ],
    ids=["cell", "in place", "stepwise", "bare", "no_grad"],
)
def test_states_that_are_cut_off_at_every_step(model: nn.Module, how: str) -> None:
    (found,) = said(model)
    assert found.kind == "no_gradient"
    assert found.severity == "warning"
    assert "the gradient over time is cut" in found.evidence
    assert how in found.evidence
    assert "with the gradient passed on there" in found.evidence
    assert "away" in found.remedy


@pytest.mark.parametrize(
    "model",
    [
        Cells(nn.GRUCell, lambda t, h: h.detach() if t % 4 == 0 else h),
        Cells(nn.GRUCell, lambda _, h: h - 0.1 * h.mean(0, keepdim=True).detach()),
        WithoutGrad(8),
    ],
    ids=["truncated", "a mean of states", "burn-in"],
)
def test_cuts_that_leave_a_memory(model: nn.Module) -> None:
    assert [f for f in said(model) if f.kind == "no_gradient"] == []


class Refined(nn.Module):
    """A fixed point that is sought without gradients, and followed by one step with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.inner, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        nn.init.orthogonal_(self.inner.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        read = self.inward(x.mean(1))
        z = torch.zeros_like(read)
        with torch.no_grad():
            for _ in range(20):
                z = torch.tanh(self.inner(z) + read)
        return self.head(torch.tanh(self.inner(z) + read))


class Taught(nn.Module):
    """A recurrence beside that of a teacher, which runs under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.teacher, self.head = nn.GRUCell(4, WIDTH), nn.GRUCell(4, WIDTH), nn.Linear(WIDTH, 2)
        self.teacher.requires_grad_(False)

    def over(self, cell: nn.GRUCell, x: Tensor) -> Tensor:
        h: Tensor = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = cell(x[:, t], h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.over(self.teacher, x)
        return self.head(self.over(self.cell, x) - target)


@pytest.mark.parametrize("model", [Refined(), Taught()], ids=["fixed point", "teacher"])
def test_loops_that_are_no_recurrence_over_time(model: nn.Module) -> None:
    assert [f for f in said(model) if "cut" in f.evidence] == []


def test_an_embedding_that_is_looked_up_at_every_step() -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inward, self.codes, self.head = nn.Linear(4, 8), nn.Embedding(16, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = x.new_zeros(len(x), 2)
            for t in range(x.shape[1]):
                z = self.inward(x[:, t])
                code = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
                total = total + self.head(z + (code - z).detach() + 0.1 * code)
            return total

    assert [f for f in said(Codes()) if "cut" in f.evidence] == []
