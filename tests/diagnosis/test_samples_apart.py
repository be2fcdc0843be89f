"""Samples of a batch that influence each other by mistake, and models in which they do so on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.states.sample_meetings import Meeting
from stabkit.diagnosis.states.samples_apart import _Along

SAMPLES, TIMES, FEATURES = 12, 7, 8


class Net(nn.Module):
    """Layers by name and a forward that is given."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.run(self, x, **others)


def found(model: nn.Module, x: Tensor, **others: Tensor) -> list[Finding]:
    return [f for f in stabkit.diagnose(stabkit.trace(model, x, kwargs=others)) if f.kind == "mixed_samples"]


def lstm(batch_first: bool, read: Callable[[Tensor], Tensor]) -> nn.Module:
    layers = {"l": nn.LSTM(FEATURES, 16, batch_first=batch_first), "o": nn.Linear(16, 2)}
    return Net(lambda m, x: m.o(read(m.l(x)[0])), **layers)


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 16, batch_first=batch_first)
    return Net(
        lambda m, x: m.o(m.e(x).mean(1)),
        e=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        o=nn.Linear(FEATURES, 2),
    )


def hidden(turned: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.l(x)[1]
        return m.o((h.transpose(0, 1).contiguous() if turned else h).view(len(x), -1))

    return Net(run, l=nn.GRU(FEATURES, 8, batch_first=True, bidirectional=True), o=nn.Linear(16, 2))


def viewed(turned: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        n, t, d = x.shape
        return m.o(m.l(x.transpose(0, 1) if turned else x.view(t, n, d))[0][-1])

    return Net(run, l=nn.LSTM(FEATURES, 16), o=nn.Linear(16, 2))


def attending(dim: int) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.o((functional.softmax(m.q(x) @ m.k(x).transpose(1, 2), dim=dim) @ x).mean(1))

    return Net(run, q=nn.Linear(FEATURES, 8), k=nn.Linear(FEATURES, 8), o=nn.Linear(FEATURES, 2))


def pooled(dim: int) -> nn.Module:
    return Net(lambda m, x: m.o((m.w(x).softmax(dim) * x).sum(1)), w=nn.Linear(FEATURES, 1), o=nn.Linear(FEATURES, 2))


def ending(by: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    layers = {"f": nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 5))}
    return Net(lambda m, x: by(m.f(before(x))), **layers)


def convolved() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.c(x)
        h = (h - h.mean(0, keepdim=True)) / (h.std(0, keepdim=True) + 1e-5)
        return m.o(h.relu().mean((2, 3)))

    return Net(run, c=nn.Conv2d(3, 8, 3), o=nn.Linear(8, 2))


SEQUENCES, TABLE = (SAMPLES, TIMES, FEATURES), (SAMPLES, FEATURES)
FAULTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "lstm": (lambda: lstm(False, lambda h: h[:, -1]), SEQUENCES, "batch_first=True at l"),
    "encoder": (lambda: encoder(False), SEQUENCES, "batch_first=True at e.layers.0.self_attn, e.layers.1.self_attn"),
    "hidden state": (lambda: hidden(False), SEQUENCES, "transpose(1, 0), or permute, before view"),
    "view for transpose": (lambda: viewed(False), SEQUENCES, "transpose(0, 1), or permute, before view"),
    "attention": (lambda: attending(0), SEQUENCES, "dim=-1 in that softmax"),
    "softmax": (lambda: ending(lambda z: z.softmax(0)), TABLE, "dim=-1 in that softmax"),
    "norm of all": (lambda: ending(lambda z: z, lambda x: x / x.norm()), TABLE, "each sample (dim=-1"),
    "largest of all": (lambda: ending(lambda z: z, lambda x: x / x.max()), TABLE, "each sample (dim=-1"),
    "normalize": (lambda: ending(lambda z: functional.normalize(z, dim=0)), TABLE, "each sample (dim=-1"),
    "softmax without an axis": (lambda: pooled(0), SEQUENCES, "dim=-2 in that softmax"),
    "batch norm by hand": (convolved, (SAMPLES, 3, 6, 6), "use a batch norm"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_samples_that_meet_by_mistake_are_told_with_where(name: str):
    make, shape, remedy = FAULTS[name]
    torch.manual_seed(0)
    (told,) = found(make(), torch.randn(shape))
    assert told.severity == "warning"
    assert remedy in told.remedy
    assert told.numbers["samples"] == SAMPLES


def test_applying_the_remedy_keeps_samples_apart():
    torch.manual_seed(0)
    model, x = encoder(False).eval(), torch.randn(SEQUENCES)
    (told,) = found(model, x)
    other = torch.cat([x[:1], torch.randn(SEQUENCES)[1:]])
    assert not torch.equal(model(x)[0], model(other)[0])
    assert stabkit.diagnosis.apply(model, told) == 2
    torch.testing.assert_close(model(x)[0], model(other)[0])
    assert not found(model, x)


def test_padding_tells_time_from_samples_where_every_position_has_an_output():
    torch.manual_seed(0)
    tokens = torch.randint(3, 20, (SAMPLES, TIMES))
    for i, row in enumerate(tokens):
        row[2 + i % 5 :] = 0
    layers = {"e": nn.Embedding(20, FEATURES), "l": nn.LSTM(FEATURES, 8)}
    model = Net(lambda m, x: m.l(m.e(x))[0], **layers)
    assert [f.severity for f in found(model, tokens)] == ["warning"]
    assert [f.severity for f in found(model, tokens.T.contiguous())] == ["info"]
    assert [f.severity for f in found(model, torch.randint(3, 20, (SAMPLES, TIMES)))] == ["info"]


class Graph(nn.Module):
    """A convolution on one graph, whose nodes are no samples."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.f = nn.Linear(FEATURES, 4)
        self.register_buffer("A", torch.eye(nodes) + torch.ones(nodes, nodes) / nodes)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(0)) / x.std(0)
        return self.f(self.A @ x)


class Edges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.f(x)
        return h.index_add(0, edges[0], h[edges[1]])


class Spread(nn.Module):
    """A discriminator that reads the deviation over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 8), nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(torch.cat([h, h.std(0).mean().expand(len(h), 1)], 1))


class Rows(nn.Module):
    """Attention among the rows of a table, as a set."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.TransformerEncoderLayer(FEATURES, 2, 16, batch_first=True), nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.e(x[None])[0])


def by_running_statistics(m: Any, x: Tensor) -> Tensor:
    h = m.f(x)
    mean = h.mean(0) if torch.is_grad_enabled() else torch.zeros(4)
    return h - mean


HEALTHY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch first": (lambda: lstm(True, lambda h: h[:, -1]), SEQUENCES),
    "time first": (lambda: lstm(False, lambda h: h[-1]), SEQUENCES),
    "encoder": (lambda: encoder(True), SEQUENCES),
    "hidden state": (lambda: hidden(True), SEQUENCES),
    "transposed": (lambda: viewed(True), SEQUENCES),
    "attention": (lambda: attending(-1), SEQUENCES),
    "pooling": (lambda: pooled(1), SEQUENCES),
    "elements of a set": (lambda: Net(lambda m, x: m.f(x - x.mean(0)).relu(), f=nn.Linear(8, 2)), TABLE),
    "softmax": (lambda: ending(lambda z: z.softmax(1)), TABLE),
    "softmax over a bag": (lambda: Net(lambda m, x: (m.f(x).softmax(0) * x).sum(0), f=nn.Linear(8, 1)), TABLE),
    "graph": (lambda: Graph(SAMPLES), TABLE),
    "spread of a batch": (Spread, TABLE),
    "rows as a set": (Rows, TABLE),
    "batch norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), TABLE),
    "batch norm of batches": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)),
        TABLE,
    ),
    "mean while training": (lambda: Net(by_running_statistics, f=nn.Linear(8, 4)), TABLE),
    "similarities": (lambda: Net(lambda m, x: m.f(x) @ m.f(x).T, f=nn.Linear(8, 4)), TABLE),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HEALTHY)
def test_models_that_keep_samples_apart_or_mix_them_on_purpose_raise_nothing(name: str, training: bool):
    make, shape = HEALTHY[name]
    torch.manual_seed(0)
    assert not [f for f in found(make().train(training), torch.randn(shape)) if serious(f)]


def test_a_graph_of_edges_is_no_batch():
    torch.manual_seed(0)
    assert not found(Edges(), torch.randn(TABLE), edges=torch.randint(0, SAMPLES, (2, 30)))


def test_frames_that_a_recurrent_layer_reads_may_be_one_sequence():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.o(m.l(m.c(x).mean((2, 3)))[0]), c=nn.Conv2d(3, 8, 3), l=nn.LSTM(8, 8), o=nn.Linear(8, 2))
    assert [f.severity for f in found(model, torch.randn(SAMPLES, 3, 6, 6))] == ["info"]


def test_the_axis_of_a_softmax_is_told_in_words():
    torch.manual_seed(0)
    (told,) = found(attending(0), torch.randn(SEQUENCES))
    assert "tried on a copy: along axis -1 no sample depends on another" in told.evidence


@pytest.mark.parametrize(
    "weigh",
    [
        lambda x, dim: functional.gumbel_softmax(x, 5.0, dim=dim),
        lambda x, dim: functional.gumbel_softmax(x, 0.5, True, 1e-10, dim),
        lambda x, dim: functional.softmax(x, dim, dtype=torch.float64),
        lambda x, dim: x.softmax(dim, torch.float64),
        lambda x, dim: torch.log_softmax(x, dim=dim),
    ],
)
def test_along_another_axis_all_else_is_as_it_was(weigh):
    x, name = torch.randn(4, 6), next(n for n in weigh.__code__.co_names if "softmax" in n)
    line = f"test_samples_apart.py:{weigh.__code__.co_firstlineno}"
    meeting = Meeting(**{field.name: None for field in fields(Meeting)} | {"name": name, "line": line})
    torch.manual_seed(0)
    wanted = weigh(x, 1)
    torch.manual_seed(0)
    with _Along(meeting, 1):
        made = weigh(x, 0)
    assert made.dtype == wanted.dtype
    assert torch.equal(made, wanted)
