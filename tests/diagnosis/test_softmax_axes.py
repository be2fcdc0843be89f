"""A softmax along another axis than its weights are summed over is told, and assignments that compete are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """One layer that mixes positions by heads (batch, heads, positions, features), and a classifier of the mean."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.first = mix, nn.Linear(5, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = self.qkv(h).view(*h.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = self.mix(q, k, v).transpose(1, 2).reshape(h.shape)
        return self.head((h + self.out(mixed)).mean(1))


def flagged() -> tuple[Tensor, Tensor]:
    """Positions of which one is marked, and what that one shows: a layer that cannot choose learns nothing."""
    x = torch.randn(96, 6, 5, generator=torch.Generator().manual_seed(1))
    marked = torch.randint(0, 6, (96,), generator=torch.Generator().manual_seed(2))
    x[..., 0] = 3.0 * functional.one_hot(marked, 6)
    return x, x[torch.arange(96), marked, 2:].argmax(1)


X, LABELS = flagged()


def said(mix: Mix, labels: Tensor = LABELS) -> list[Finding]:
    found = examine(stabkit.trace(Model(mix), X), lambda out: functional.cross_entropy(out, labels)).findings
    return [f for f in found if f.kind == "axes"]


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.dropout(torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-2), 0.1, False) @ v


def without_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(nn.Softmax(dim=1)(torch.matmul(q, k.transpose(2, 3)) * 0.3), v)


def by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -1e9)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(2), v)


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -1e9)
    return torch.softmax(scores, 1) @ v


def of_padded_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padded = torch.zeros(len(q), 1, 1, 6, dtype=torch.bool)
    padded[::2, ..., 4:] = True
    return (q @ k.mT / 8**0.5).masked_fill(padded, float(torch.finfo(q.dtype).min)).softmax(-2) @ v


@pytest.mark.parametrize(
    ("mix", "axis", "harm"),
    [
        (over_queries, -2, "60 steps of Adam (rate 0.01 or 0.001, whichever ends lower) leave "),
        (by_letters, -2, "weights of earlier queries change by up to 0."),
        (over_heads, -3, "keys that a mask hides get weights of up to 0.5"),
        (of_padded_keys, -2, "keys that a mask hides get weights of up to 0.17"),
    ],
)
def test_softmax_over_queries_or_heads_that_does_harm(mix: Mix, axis: int, harm: str) -> None:
    (found,) = said(mix)
    assert found.severity == "warning"
    assert f"along axis {axis} of (96, 2, 6, 6)" in found.evidence
    assert "dim=-1" in found.remedy
    assert harm in found.evidence


@pytest.mark.parametrize(
    ("mix", "labels"), [(without_dim, LABELS), (over_queries, X.mean(1)[:, 2:].argmax(1))], ids=["heads", "a mean"]
)
def test_softmax_over_another_axis_with_which_training_learns_as_much_is_a_fact(mix: Mix, labels: Tensor) -> None:
    (found,) = said(mix, labels)
    assert found.severity == "info"
    assert "with the softmax along axis -1" in found.evidence
    assert "if it is meant" in found.remedy


def over_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def of_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of keys against queries, a softmax over the keys, and values from the left, as for images."""
    return (v.transpose(-2, -1) @ (k @ q.transpose(-2, -1)).softmax(-2)).transpose(-2, -1)


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-2) + 1e-8
    return (weights / weights.sum(-1, keepdim=True)) @ v


def divided_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-2)
    return (weights @ v) / weights.sum(-1, keepdim=True)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def clusters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shares = q[..., :3].softmax(-1)
    return shares @ (shares.transpose(-2, -1) @ v)


@pytest.mark.parametrize("mix", [over_keys, of_columns, slots, divided_after, linear, clusters])
def test_weights_that_are_meant(mix: Mix) -> None:
    assert not said(mix)


class Words(nn.Module):
    """Log-probabilities of the next word, along an axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(12, 16), nn.GRU(16, 16, batch_first=True)
        self.out, self.dim = nn.Linear(16, 12), dim

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.log_softmax(self.out(self.mix(self.embed(tokens))[0]), self.dim)


@pytest.mark.parametrize(("dim", "wrong"), [(1, True), (2, False)])
def test_words_whose_probabilities_sum_over_positions(dim: int, wrong: bool) -> None:
    tokens = torch.randint(0, 12, (6, 9), generator=torch.Generator().manual_seed(0))
    found = examine(
        stabkit.trace(Words(dim), tokens),
        lambda out: functional.nll_loss(out[:, :-1].reshape(-1, 12), tokens[:, 1:].reshape(-1)),
    ).findings
    assert any("softmax along axis 1 of (6, 9, 12)" in f.evidence for f in found) == wrong


@pytest.mark.parametrize(
    ("log", "wrong"),
    [
        (lambda out: out.log_softmax(0), True),
        (lambda out: out.softmax(0).log(), True),
        (lambda out: out.log_softmax(1), False),
        (lambda out: (out.softmax(1) + 1e-9).log(), False),
    ],
)
def test_class_probabilities_that_sum_over_the_batch(log: Callable[[Tensor], Tensor], wrong: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    labels = torch.arange(24) % 3
    found = examine(stabkit.trace(model, torch.randn(24, 5)), lambda out: functional.nll_loss(log(out), labels))
    assert any("softmax along axis 0 of (24, 3)" in f.evidence for f in found.findings) == wrong


def test_softmaxes_as_activations_are_named_where_a_gradient_vanishes():
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Linear(32, 32), nn.Softmax(-1))]
    x = torch.randn(48, 32)
    report = stabkit.analyze(
        nn.Sequential(*layers, nn.Linear(32, 4)),
        x,
        loss=lambda out: functional.cross_entropy(out, torch.arange(48) % 4),
        spectrum="none",
    )
    found = next(f for f in report.findings if f.kind == "vanishing")
    assert "3 softmaxes stand in it as activations (1 and 3 and 1 more)" in found.evidence
