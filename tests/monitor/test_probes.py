"""What presets above economy measure beside the norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.monitor import Monitor
from tests.monitor.networks import Layers, hooks_of, train


def test_standard_probes_growth_and_singular_values_on_schedule():
    _, monitor = train(
        Layers(depth=5).double(),
        lambda: torch.randn(6, 6, dtype=torch.float64),
        5,
        lambda m, _: Monitor(m, 1, "standard", probe_every=2),
    )
    assert [bool(record.probes) for record in monitor.records] == [True, False, True, False, True]
    probes = monitor.records[0].probes
    assert len(probes["growth"]) == len(probes["steps"]) == 5
    assert len(probes["largest_singular_values"]) == 3


def test_a_singular_value_is_that_of_the_block():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(5)]).double()
    truth = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in model]
    monitor = Monitor(model, 1, "standard")
    model(torch.randn(3, 5, dtype=torch.float64)).square().sum().backward()
    monitor.step()
    found = monitor.records[0].probes["largest_singular_values"]
    assert list(found.values()) == pytest.approx([truth[0], truth[2], truth[4]], rel=2e-2)
    monitor.close()


def test_full_raises_the_findings_of_diagnose():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(0.05)
    monitor = Monitor(model, 1, "full", probe_every=1)
    x = torch.randn(4, 8)
    for _ in range(2):
        model(x).square().sum().backward()
        monitor.step()
    monitor.close()
    kinds = [(finding.kind, finding.module_path) for finding in monitor.findings]
    assert "vanishing" in dict(kinds)
    assert len(kinds) == len(set(kinds))  # what stays is said once
    assert hooks_of(model) == 0


def test_a_model_that_cannot_be_traced_keeps_its_norms(monkeypatch):
    import stabkit.monitor.probes as probes
    from stabkit.errors import TraceError

    def refuse(*_, **__):
        raise TraceError("no graph")

    monkeypatch.setattr(probes, "trace", refuse)
    _, monitor = train(Layers(), lambda: torch.randn(4, 6), 2, lambda m, _: Monitor(m, 1, "standard"))
    assert monitor.records[0].probes == {"skipped": "no graph"}
    assert len(monitor.records) == 2


def test_the_probes_do_not_replace_the_batch_of_a_capsule(tmp_path):
    from stabkit.monitor import replay

    def watch(model, _):
        monitor = Monitor(model, 1, "full", directory=tmp_path, probe_every=1)
        monitor.capsule()
        return monitor

    _, monitor = train(Layers(), lambda: torch.randn(9, 6), 1, watch)
    again = replay(monitor.capsules[0], Layers)
    assert again.capsule.calls[0].args[0].shape == (9, 6)
    assert again.agrees(1e-6)
