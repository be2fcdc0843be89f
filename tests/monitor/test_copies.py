"""A model that is being watched can be copied, saved whole and traced at any time; its copies are not watched."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from stabkit.monitor import Monitor
from tests.monitor.networks import mlp


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def operations(traced):
    return [node.kind() for node in traced.inlined_graph.nodes()]


def test_copies_are_neither_watched_nor_in_the_way(tmp_path):
    model, x = mlp(), torch.ones(2, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, 1, "standard", directory=tmp_path, optimizer=optimizer) as monitor:
        model(x).sum().backward()
        average = torch.optim.swa_utils.AveragedModel(model)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model), average]
        copies += [copy.deepcopy(copies[0]), saved(copies[1])]
        copy.deepcopy(optimizer)
        with torch.no_grad():
            expected = model(x)
        for one in copies:
            output = one(x)
            assert torch.equal(output, expected)
            output.sum().backward()
        monitor.step(1.0)
    assert {block.calls for block in monitor.records[0].blocks} == {1.0}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_model_that_is_watched_can_be_traced_and_exported(tmp_path):
    model, x = mlp().eval(), torch.ones(2, 8)
    plain = operations(torch.jit.trace(model, x))
    with Monitor(model, 1, directory=tmp_path) as monitor:
        assert operations(torch.jit.trace(model, x)) == plain
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x), model(x))
        monitor.step()
    assert {block.calls for block in monitor.records[0].blocks} == {1.0}


def test_a_saved_model_opens_without_stabkit(tmp_path):
    with Monitor(model := torch.nn.Sequential(torch.nn.Linear(2, 2)), 1, directory=tmp_path):
        torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['stabkit'] = None; "
        f"print(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)(torch.ones(1, 2)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr
