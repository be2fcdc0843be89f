"""A classification loss far above equal chances is said of the layer that makes the logits, or of the input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, apply, examine

TOKENS = torch.randint(0, 50, (16, 7), generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 10


def images() -> Tensor:
    return torch.randn(32, 20, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    """A language model whose head is the table of its embedding."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.mix, self.head = nn.GRU(64, 64, batch_first=True), nn.Linear(64, 50, bias=False)
        nn.init.normal_(self.table.weight, std=size)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(self.norm(x + self.mix(x)[0]))


class Prototypes(nn.Module):
    """Scores of a normed code against one standard normal vector per token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.prototypes = nn.Parameter(torch.randn(64, 50))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.table(tokens)) @ self.prototypes


def classifier(head: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    model[4].weight.data.mul_(head)
    return model


def next_token(out: Tensor) -> Tensor:
    return functional.cross_entropy(out[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def label(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, LABELS)


def said(model: nn.Module, inputs: Tensor) -> list[Finding]:
    loss = label if inputs.is_floating_point() else next_token
    return [f for f in examine(stabkit.trace(model, inputs), loss).findings if f.kind == "loss"]


@pytest.mark.parametrize(
    ("model", "inputs", "path", "weight"),
    [
        (Tied(1.0), TOKENS, "head", "head.weight, which is table.weight too,"),
        (Prototypes(), TOKENS, "loss", "prototypes"),
    ],
    ids=["a tied embedding", "prototypes"],
)
def test_a_head_that_is_too_loud_is_named_and_the_remedy_cures(model, inputs, path, weight):
    (found,) = said(model, inputs)
    assert (found.severity, found.module_path) == ("warning", path)
    assert found.numbers["chance"] == pytest.approx(math.log(50))
    assert found.numbers["loss"] > 3 * math.log(50) > 2 * found.numbers["after"]
    assert f"with {weight}" in found.evidence
    assert "20 steps of plain SGD" in found.evidence
    treated = copy.deepcopy(model)
    apply(treated, found)
    assert said(treated, inputs) == []


def test_a_weight_that_is_named_already_explains_the_loss():
    (found,) = said(classifier(300.0), images())  # with 100 it is learnt as well, by plain descent too
    assert (found.severity, found.module_path) == ("info", "4")
    assert "that of the other findings" in found.remedy


class Amplified(nn.Module):
    """A state that is made large before a head of usual size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(20, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(40 * self.stem(x).tanh())


def test_a_head_of_usual_size_is_not_blamed_for_the_state_that_it_reads():
    (found,) = said(Amplified(), images())
    assert (found.severity, found.module_path, found.actions) == ("info", "head", ())
    assert "head.weight is of usual size, and the state that it reads is not" in found.evidence


def test_an_input_that_is_too_large_is_named_instead():
    model, inputs = classifier(), 255 * images()
    (found,) = said(model, inputs)
    assert found.severity == "warning"
    assert "divide the input where the data are read by" in found.remedy
    assert not found.actions
    assert said(model, inputs / 255) == []


def test_loud_logits_that_are_right_are_no_fault():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        label(model(images())).backward()
        optimizer.step()
    model[2].weight.data.mul_(10)
    model[2].bias.data.mul_(10)
    assert said(model, images()) == []


@pytest.mark.parametrize("model", [Tied(0.05), Tied(0.125)], ids=["0.05", "one over the root of the width"])
def test_a_tied_embedding_of_usual_size_is_no_fault(model):
    assert said(model, TOKENS) == []
