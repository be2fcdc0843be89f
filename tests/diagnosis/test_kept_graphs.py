"""States that a model keeps between calls: on their graph, or off it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import stabkit
from stabkit.diagnosis.finding import serious

IDS = torch.randint(0, 12, (6, 9), generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(12, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 12)
        self.how, self.hidden = how, None
        self.cache: dict[str, Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.cache.get("last") if self.how == "dict" else self.hidden
        if hidden is not None and self.how == "begin":
            hidden = tuple(h.detach() for h in hidden)
        out, last = self.lstm(self.embed(ids), None if self.how == "unread" else hidden)
        if self.how == "end":
            last = tuple(h.detach() for h in last)
        if self.how == "dict":
            self.cache["last"] = last
        else:
            self.hidden = last
        return self.out(out)


class Average(nn.Module):
    """What went through, in a buffer: on the graph, or off it."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.net, self.out = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        mean = 0.9 * self.mean + 0.1 * h.mean(0)
        self.mean = mean.detach() if self.detach else mean
        return self.out(h - mean)


def said(model: nn.Module, x: Tensor) -> list[stabkit.Finding]:
    loss = (
        (lambda out: functional.cross_entropy(out.transpose(1, 2), IDS)) if x is IDS else lambda out: out.pow(2).mean()
    )
    report = stabkit.analyze(model, x, loss=loss, spectrum="none")
    return [f for f in report.findings if f.kind == "kept_graph"]


@pytest.mark.parametrize(("how", "where"), [("keep", "hidden"), ("dict", "cache")])
def test_a_state_on_its_graph_is_named_with_what_takes_it_off(how: str, where: str):
    torch.manual_seed(0)
    model = Recurrent(how)
    (found,) = said(model, IDS)
    assert serious(found)
    assert found.module_path == where
    assert "second time" in found.evidence
    assert "detach" in found.remedy
    assert model.hidden is None
    assert not model.cache


def test_a_buffer_on_its_graph_is_named():
    torch.manual_seed(0)
    (found,) = said(Average(detach=False), torch.randn(16, 4))
    assert found.module_path == "mean"
    assert "self.mean = self.mean.detach()" in found.remedy


@pytest.mark.parametrize("how", ["begin", "end", "unread"])
def test_states_that_are_detached_or_not_read_are_in_order(how: str):
    torch.manual_seed(0)
    assert said(Recurrent(how), IDS) == []


def test_what_every_call_computes_anew_is_in_order():
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    assert said(Average(detach=True), x) == []
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    assert said(normed, x) == []


class Asking(nn.Module):
    """Asks the gradient of its input by the attribute, which torch allows of leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad = True
        return self.layer(x)


def test_a_model_that_asks_for_the_gradient_of_its_input_is_in_order():
    assert said(Asking(), torch.randn(16, 4)) == []
