from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.errors import TraceError
from stabkit.tracing import trace


@pytest.mark.parametrize(
    ("layer", "x", "words"),
    [
        (nn.Linear(4, 2), torch.ones(5, 3), r"inputs of shape \(5, 3\); it takes \(\.\.\., 4\) of float32"),
        (nn.Linear(4, 2), torch.ones(5, 4, dtype=torch.long), r"it takes \(\.\.\., 4\) of float32"),
        (nn.Conv2d(3, 2, 3), torch.ones(1, 1, 8, 8), r"it takes \(batch, 3, size, size\) of float32"),
        (nn.Embedding(7, 2), torch.full((1, 4), 9), "it takes integers from 0 to 6"),
        (nn.LSTM(5, 7, batch_first=True), torch.ones(1, 3, 4), r"it takes \(batch, time, 5\) of float32"),
        (nn.LayerNorm((2, 3)).double(), torch.ones(1, 3, 3).double(), r"it takes \(\.\.\., 2, 3\) of float64"),
    ],
    ids=str,
)
def test_an_input_that_does_not_fit_is_told_what_would(layer, x, words):
    with pytest.raises(TraceError, match=rf"failed in module '0'.*{words}"):
        trace(nn.Sequential(layer), x)
