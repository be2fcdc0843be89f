from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import stabkit
from stabkit.errors import StabkitError
from stabkit.planning import plan
from stabkit.planning.budgeting import _lessened
from stabkit.planning.machine_speed import Machine, PeakMemory
from stabkit.planning.measured_run import StepCost, Trial
from stabkit.planning.predicted_cost import Costs, Settings


def network(width: int = 32, depth: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]).eval()


def test_operations_are_those_of_the_matrix_products():
    found = plan(network(), torch.randn(4, 32), spectrum="none")
    assert found.forward_flops == 5 * 2 * 32**2  # a multiplication and an addition for every weight
    assert found.product_flops == 5 * 2 * 32**2  # a product with the transpose of a matrix takes as many


def test_more_probes_and_spectra_cost_more_in_every_unit():
    x = torch.randn(4, 32)
    few = plan(network(), x, spectrum="none", probes=1)
    many = plan(network(), x, spectrum="none", probes=100)
    spectra = plan(network(), x, spectrum="krylov", probes=1)
    assert many.price.products - few.price.products == 99 * 5
    assert many.price.flops > few.price.flops
    assert many.price.read_bytes > few.price.read_bytes
    assert spectra.price.products > few.price.products


def test_what_does_not_fit_is_given_up_and_named():
    model, x = network(), torch.randn(8, 32)
    whole = plan(model, x)
    least = plan(model, x, budget=1e-9)
    assert whole.fits
    assert not whole.given_up
    assert not least.fits
    assert (least.settings.samples, least.settings.probes, least.settings.spectrum) == (1, 1, "none")
    assert [words.split()[0] for words in least.given_up] == ["all", "1", "1"]
    assert "DOES NOT FIT" in str(least)


def known_costs() -> Costs:
    """Ten steps of 100 numbers; a second and a gigabyte for every sample, on top of one second and one gigabyte."""
    steps = (StepCost(100, 100, True, 0.01, 0.01, 1e6),) * 10
    double = (StepCost(100, 100, True, 0.02, 0.02, 2e6),) * 10
    machine = Machine("cpu", 1, 1e11, 1e10, 0.0)
    one = Trial(1, 2.0, 0.0, 1e7, 0, 2 * 10**9, steps)
    two = Trial(2, 3.0, 0.0, 2e7, 0, 3 * 10**9, double)
    return Costs(machine, 1000, one, two)


def test_prices_grow_linearly_with_samples_and_probes():
    costs = known_costs()
    assert costs.price(Settings(1, 1, "none", 1)).seconds == pytest.approx(2.0)
    assert costs.price(Settings(8, 1, "none", 1)).seconds == pytest.approx(9.0)
    assert costs.price(Settings(8, 5, "none", 1)).seconds == pytest.approx(9.0 + 4 * 10 * 0.01 * 8)
    assert costs.price(Settings(8, 1, "none", 1)).peak_bytes == 9 * 10**9
    krylov = costs.price(Settings(1, 1, "krylov", 1))
    assert krylov.products - costs.price(Settings(1, 1, "none", 1)).products == 10 * (320 + 400)
    assert krylov.seconds > 2.0 + 10 * 720 * 0.01


@pytest.mark.parametrize(
    ("budget", "memory", "expected"),
    [
        ("1h", "64G", Settings(8, 4, "none", 1)),
        (10, None, Settings(8, 2, "none", 1)),  # 9 s and 0.8 s a probe more
        (8, None, Settings(4, 1, "none", 1)),
        (None, 4 * 10**9, Settings(2, 1, "none", 1)),  # 3 GB
        ("1s", None, Settings(1, 1, "none", 1)),
    ],
)
def test_a_budget_is_kept_with_the_least_loss(monkeypatch, budget, memory, expected):
    monkeypatch.setattr("stabkit.planning.budgeting._costs", lambda *_: known_costs())
    found = plan(network(), torch.randn(8, 32), spectrum="none", budget=budget, memory=memory)
    assert found.settings == expected
    assert found.fits == (budget != "1s")
    assert bool(found.given_up) == (expected != Settings(8, 4, "none", 1))


def test_a_plan_can_be_carried_out():
    model, x = network(), torch.randn(8, 32)
    found = plan(model, x, budget=1e-9)
    inputs, kwargs = found.call(x)
    report = stabkit.analyze(model, *inputs, kwargs=kwargs, **found.arguments())
    assert inputs[0].shape == (1, 32)
    assert report.loss == "1 standard normal cotangents per sample"
    assert all(step.spectrum_method == "none" for step in report.steps)


def test_settings_are_given_up_one_by_one_down_to_the_least():
    settings = [choice for choice, _ in _lessened(Settings(8, 4, "dense", 2))]
    assert settings[0] == Settings(8, 4, "dense", 2)
    assert settings[-1] == Settings(1, 1, "none", 1)
    assert len(set(settings)) == len(settings)
    lost = [words for _, words in _lessened(Settings(8, 4, "none", 1))]
    assert not any("spectra" in word or "eigenvalues" in word for words in lost for word in words)


def test_the_model_comes_back_as_it_was():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan(model, torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_plan_is_plain_data_and_readable():
    found = plan(network(), torch.randn(2, 32), budget="10m", memory="8G")
    assert json.loads(json.dumps(found.to_dict()))["settings"]["samples"] == 2
    assert "of 10 min" in str(found)
    assert "peak memory" in str(found)


def test_peak_memory_sees_what_is_gone_again():
    with PeakMemory(torch.device("cpu")) as small:
        pass
    with PeakMemory(torch.device("cpu")) as large:
        torch.ones(2**26)
    if small.most is None or large.most is None:
        pytest.skip("the system does not say")
    assert large.most - small.most > 0.9 * 2**28


def test_a_slow_model_is_recorded_but_not_analysed(monkeypatch):
    monkeypatch.setattr("stabkit.planning.measured_run._SLOW", 0.0)
    monkeypatch.setattr("stabkit.planning.measured_run.examine", None)
    found = plan(network(), torch.randn(4, 32), spectrum="krylov")
    assert found.steps == 5
    assert found.product_flops == 5 * 2 * 32**2
    assert found.price.seconds > 0


def test_an_unknown_spectrum_is_refused():
    with pytest.raises(StabkitError, match="expected one of auto, full"):
        plan(network(), torch.randn(2, 32), spectrum="all")
