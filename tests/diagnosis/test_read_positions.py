"""A reading at a position that has seen few of the others is told where another one has seen more, and learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding
from stabkit.diagnosis.inputs.read_positions import read_position_findings
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.training_pass import training_pass

SAMPLES, LENGTH = 48, 12
_DRAWS = torch.Generator().manual_seed(1)
TOKENS = torch.randint(1, 40, (SAMPLES, LENGTH), generator=_DRAWS)
LABELS = ((TOKENS < 9).sum(1) > 2).long()
VECTORS = torch.randn(SAMPLES, LENGTH, 6, generator=_DRAWS)
OF_VECTORS = (VECTORS[..., 0].mean(1) > 0).long()


class Recurrence(nn.Module):
    """A recurrence over vectors, of which one output is read."""

    def __init__(self, read: str, cell: type[nn.RNNBase] = nn.LSTM, directions: int = 1, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = cell(6, 16, batch_first=first, bidirectional=directions == 2)
        self.head, self.read = nn.Linear(16 * directions, 2), read

    def forward(self, x: Tensor) -> Tensor:
        out = self.cell(x)[0]
        reads = {
            "first": lambda: out[:, 0],
            "first kept": lambda: out[:, :1].squeeze(1),
            "select": lambda: out.select(1, 0),
            "time first": lambda: out[0],
            "last": lambda: out[:, -1, :],
            "time last": lambda: out[-1],
            "mean": lambda: out.mean(1),
            "states": lambda: torch.cat([out[:, -1, :16], out[:, 0, 16:]], -1),
        }
        return self.head(reads[self.read]())


class Encoder(nn.Module):
    """Attention over tokens, with a token of its own before or behind them, or none."""

    def __init__(self, causal: bool, token: str = "", read: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(40, 16), nn.Parameter(torch.randn(1, LENGTH + bool(token), 16))
        self.token = nn.Parameter(torch.randn(1, 1, 16)) if token else None
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 2)
        self.causal, self.before, self.read = causal, token == "before", read

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.token is not None:
            own = self.token.expand(len(x), 1, -1)
            h = torch.cat([own, h] if self.before else [h, own], 1)
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1]) if self.causal else None
        return self.head(self.encoder(h + self.places, mask=mask)[:, self.read])


class Causal(nn.Module):
    """Convolutions that see what came before."""

    def __init__(self, read: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv1d(c, 16, 3, dilation=d) for c, d in ((6, 1), (16, 2), (16, 4)))
        self.head, self.read = nn.Linear(16, 2), read

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2)
        for conv in self.convs:
            h = conv(functional.pad(h, (2 * conv.dilation[0], 0))).relu()
        return self.head(h[..., self.read])


def said(model: nn.Module, x: Tensor, labels: Tensor) -> list[Finding]:
    flow = stabkit.trace(model, x)

    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out, labels)

    return read_position_findings(TrainingRun(flow, loss, flow.forward_pass, training_pass(flow.forward_pass, loss)))


@pytest.mark.parametrize(
    ("model", "x", "labels", "seen"),
    [
        (Recurrence("first"), VECTORS, OF_VECTORS, "the first 1 of"),
        (Recurrence("first kept", nn.GRU), VECTORS, OF_VECTORS, "the first 1 of"),
        (Recurrence("select", nn.RNN), VECTORS, OF_VECTORS, "the first 1 of"),
        (Recurrence("time first", first=False), VECTORS.transpose(0, 1), OF_VECTORS, "the first 1 of"),
        (Encoder(True), TOKENS, LABELS, "the first 1 of"),
        (Encoder(True, "before"), TOKENS, LABELS, "none of"),
    ],
    ids=["lstm", "gru", "rnn", "time first", "causal", "token before"],
)
def test_a_position_that_has_seen_none_of_the_others(model: nn.Module, x: Tensor, labels: Tensor, seen: str):
    (found,) = said(model, x, labels)
    assert (found.kind, found.severity) == ("no_influence", "warning")
    assert f"depends on {seen} {LENGTH} positions" in found.evidence
    assert "read the last position" in found.remedy
    assert ("causal mask" in found.remedy) == (seen == "none of")


@pytest.mark.parametrize(
    ("model", "x", "labels"),
    [
        (Recurrence("last"), VECTORS, OF_VECTORS),
        (Recurrence("time last", first=False), VECTORS.transpose(0, 1), OF_VECTORS),
        (Recurrence("mean", directions=2), VECTORS, OF_VECTORS),
        (Encoder(True, read=-1), TOKENS, LABELS),
        (Encoder(True, "behind", read=-1), TOKENS, LABELS),
        (Encoder(False), TOKENS, LABELS),
        (Encoder(False, "before"), TOKENS, LABELS),
        (Causal(-1), VECTORS, OF_VECTORS),
    ],
)
def test_a_position_that_has_seen_all(model: nn.Module, x: Tensor, labels: Tensor):
    assert said(model, x, labels) == []


def test_a_first_token_that_matters_is_no_warning():
    (found,) = said(Recurrence("first"), VECTORS, (VECTORS[:, 0, 0] > 0).long())
    assert found.severity == "info"
    assert "none is needed" in found.remedy


def test_convolutions_that_learn_the_batch_by_heart_from_one_position_are_a_fact():
    (found,) = said(Causal(0), VECTORS, OF_VECTORS)
    assert found.severity == "info"
    assert f"depends on the first 1 of {LENGTH} positions" in found.evidence
    assert "read at -1 it depends on the last 12" in found.evidence


def test_two_directions_at_one_end():
    for read in ("last", "first"):
        (found,) = said(Recurrence(read, directions=2), VECTORS, OF_VECTORS)
        one = "backward" if read == "last" else "forward"
        assert found.module_path == "cell"
        assert f"the {one} one has seen a single one" in found.evidence
    # what one direction is told at the end is of little matter where the other remembers
    ends = (VECTORS[:, -1, 0] > 0).long()
    (found,) = said(Recurrence("last", directions=2), VECTORS, ends)
    assert found.severity == "info"


def test_two_directions_each_where_it_has_seen_all():
    assert said(Recurrence("states", directions=2), VECTORS, OF_VECTORS) == []
