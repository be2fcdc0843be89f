"""A last position that lies behind padding is told where the same model learns with padding in front."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.inputs.padding import padded_end_findings
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.training_pass import training_pass

SAMPLES, LENGTH = 32, 80
_DRAWS = torch.Generator().manual_seed(1)
LABELS = torch.randint(0, 2, (SAMPLES,), generator=_DRAWS)
LENGTHS = torch.randint(3, 8, (SAMPLES,), generator=_DRAWS)
ENDED = torch.arange(LENGTH) >= LENGTHS[:, None]
TOKENS = torch.randint(11, 50, (SAMPLES, LENGTH), generator=_DRAWS)
TOKENS[:, 1] = 1 + 5 * LABELS + torch.randint(0, 5, (SAMPLES,), generator=_DRAWS)
TOKENS[ENDED] = 0


class Reader(nn.Module):
    """A recurrence over tokens or vectors, of which one state is read."""

    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM, read: str = "last", vectors: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Identity() if vectors else nn.Embedding(50, 16)
        self.cell, self.head, self.read = cell(16, 24, batch_first=True), nn.Linear(24, 2), read

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(self.embed(x))[0]
        if self.read == "mean":
            return self.head(h.mean(1))
        return self.head(h[:, -1] if self.read == "last" else h[torch.arange(len(h)), LENGTHS - 1])


VECTORS = nn.functional.one_hot(TOKENS % 16, 16).float().masked_fill(ENDED[..., None], 0.0)


def said(model: nn.Module, x: Tensor, labels: Tensor = LABELS) -> list[Finding]:
    flow = stabkit.trace(model, x)

    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out, labels)

    return padded_end_findings(TrainingRun(flow, loss, flow.forward_pass, training_pass(flow.forward_pass, loss)))


@pytest.mark.parametrize(
    ("model", "x"),
    [(Reader(nn.RNN), TOKENS), (Reader(), TOKENS), (Reader(vectors=True), VECTORS)],
    ids=["rnn", "lstm", "vectors"],
)
def test_the_last_position_behind_padding(model: nn.Module, x: Tensor):
    (found,) = said(model, x)
    assert found.severity == "warning"
    assert "hold 3 to 7 of 80 positions and the rest is" in found.evidence
    assert "last real token" in found.remedy


def test_what_is_read_elsewhere_or_padded_in_front_or_learnt_anyhow_raises_nothing():
    assert said(Reader(read="its own last"), TOKENS) == []
    assert said(Reader(read="mean"), TOKENS) == []
    assert said(Reader(), TOKENS.flip(1)) == []
    assert said(Reader(nn.GRU), TOKENS) == []  # whose gates open within the few steps


def test_a_memory_that_is_long_enough_without_the_padding_is_no_second_warning():
    found = stabkit.diagnose(stabkit.trace(Reader(), TOKENS), lambda out: functional.cross_entropy(out, LABELS))
    assert [f.kind for f in found if serious(f)] == ["no_influence"]
    (memory,) = [f for f in found if f.kind == "vanishing"]
    assert "with the remedy of no_influence" in memory.evidence
    assert memory.actions == ()
