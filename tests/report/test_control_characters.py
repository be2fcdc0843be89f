"""Names come from models and files; no control character in one reaches a page, a table, a picture or a terminal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stabkit
from stabkit.errors import StabkitError, TraceError
from stabkit.monitor.writers import CSVWriter

NAMES = ("a\x1b[31mred", "b\x07\x00z", "c\u202eevil\u2028x", "d\x9b31m", "e\r\tf")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        for part in self.children():
            x = torch.tanh(part(x))
        return x


def shown(text):
    return {c for c in text if not c.isprintable() and c not in "\n"}


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return stabkit.analyze(Named(), torch.randn(2, 4), name="n\x1b[2Jx\u202e")


@pytest.mark.parametrize("suffix", [".csv", ".html", ".json", ".svg"])
def test_files(report, tmp_path, suffix):
    text = report.save(tmp_path / f"x{suffix}").read_text()
    assert "evil" in text or suffix == ".svg"
    assert not shown(text)


def test_what_is_printed(report):
    flow = stabkit.trace(Named(), torch.ones(1, 4))
    with pytest.raises(TraceError) as refused:
        stabkit.trace(Named(), torch.ones(1, 4), depth=["q\x1b[31m"])
    for told in (str(report), repr(flow), str(refused.value), str(StabkitError("\x1b[2J"))):
        assert not shown(told)
    assert "a\\x1b[31mred" in str(refused.value)


def test_comparisons_and_runs(tmp_path):
    weights = {f"{name}.{part}": value for name in NAMES for part, value in nn.Linear(4, 4).state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    found = stabkit.compare([tmp_path / "w.pt"], model=Named, input="2x4")
    assert not shown(found.save(tmp_path / "x.csv").read_text())
    assert not shown(str(found))
    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    table = CSVWriter(tmp_path / "run.csv")
    with stabkit.Monitor(model, 1, writers=[table], directory=tmp_path / "run", optimizer=optimizer) as monitor:
        for _ in range(2):
            loss = model(torch.ones(2, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    told = (tmp_path / "run.csv").read_text()
    assert "evil" in told
    assert not shown(told)
