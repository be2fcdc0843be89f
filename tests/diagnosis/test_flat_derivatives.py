"""Second derivatives of activations that are linear between their kinks, which hold no parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis.remedies import alternatives
from stabkit.diagnosis.suspects import Settings, suspected
from stabkit.errors import TraceError


class Informed(nn.Module):
    """A solution with its second derivative by the first coordinate, as physics-informed networks return it."""

    def __init__(self, activation: type[nn.Module], own_input: bool, order: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 1))
        self.own_input, self.order = own_input, order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.own_input:
            x = x.detach().clone().requires_grad_(True)
        solution = derivative = self.net(x)
        for _ in range(self.order):
            derivative = torch.autograd.grad(derivative.sum(), x, create_graph=True)[0][:, :1]
        return derivative, solution


X = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))


def residual(output: tuple[Tensor, Tensor]) -> Tensor:
    return (output[0] - 1).square().mean()


def with_boundary(output: tuple[Tensor, Tensor]) -> Tensor:
    return residual(output) + output[1].square().mean()


def flat(model: nn.Module, loss) -> list:
    report = stabkit.analyze(model, X, loss=loss, spectrum="none")
    assert str(report)
    assert "nan" not in str(report)
    return [finding for finding in report.findings if "second derivative" in finding.evidence]


@pytest.mark.parametrize("own_input", [True, False])
@pytest.mark.parametrize(("activation", "name"), [(nn.ReLU, "ReLU"), (nn.LeakyReLU, "LeakyReLU")])
def test_a_second_derivative_that_is_zero_is_named_with_its_activation(activation, name, own_input):
    torch.manual_seed(0)
    (found,) = flat(Informed(activation, own_input), with_boundary)
    assert (found.kind, found.severity, found.module_path) == ("no_gradient", "warning", "net.1")
    assert f"a second derivative of {name} (net.1, net.3)" in found.evidence
    assert "test_flat_derivatives.py" in found.evidence
    assert "smooth activation" in found.remedy


def test_where_nothing_else_is_in_the_loss_no_parameter_gets_a_gradient():
    torch.manual_seed(0)
    (found,) = flat(Informed(nn.ReLU, True), residual)
    assert found.severity == "critical"
    assert "no parameter gets a gradient from the loss (net.0.weight" in found.evidence


@pytest.mark.parametrize("own_input", [True, False])
@pytest.mark.parametrize(("activation", "order"), [(nn.Tanh, 2), (nn.SiLU, 2), (nn.ReLU, 1)])
def test_smooth_activations_and_first_derivatives_raise_nothing(activation, order, own_input):
    torch.manual_seed(0)
    model = Informed(activation, own_input, order)
    assert flat(model, with_boundary) == []
    findings = stabkit.analyze(model, X, loss=with_boundary, spectrum="none").findings
    assert [finding for finding in findings if finding.severity != "info"] == []


def test_without_a_way_from_the_input_a_report_has_no_steps():
    report = stabkit.analyze(Informed(nn.Tanh, True), X, loss=with_boundary)
    assert (report.verdict, report.steps) == ("not judged", ())
    assert "the output depends on '0' by copies that the model takes off the graph itself" in report.summary
    assert "No growth over depth was measured" in str(report)
    with pytest.raises(TraceError, match="no derivative leads back to what was given"):
        stabkit.analyze(Informed(nn.Tanh, True), X)


def test_a_loss_that_is_not_finite_is_told_without_a_flow():
    report = stabkit.analyze(Informed(nn.Tanh, True), X, loss=lambda out: (out[1] - 100).log().mean())
    assert report.verdict == "non-finite"
    assert "a logarithm of negative numbers" in report.findings[0].evidence


def test_the_derivative_of_an_activation_is_no_activation():
    torch.manual_seed(0)
    report = stabkit.analyze(Informed(nn.ReLU, False), X, loss=with_boundary, spectrum="none")
    assert [finding for finding in report.findings if finding.kind == "dead"] == []


def test_no_relus_are_tried_where_a_model_takes_second_derivatives():
    torch.manual_seed(0)
    model = Informed(nn.Tanh, False)
    whole, net = stabkit.trace(model, X).following(with_boundary), stabkit.trace(model.net, X)
    assert alternatives._unbounded(suspected(net, Settings()).measurement, net) is not None
    assert alternatives._unbounded(suspected(net, Settings()).measurement, whole) is None


def test_slopes_that_are_the_same_within_a_region_are_reached_through_the_weights():
    """The first derivative of a network of ReLUs does not change with its input, and with every weight."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.f = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = x.clone().requires_grad_(True)
            return torch.autograd.grad(self.f(torch.cat([x, t], 1)).sum(), x, create_graph=True)[0]

    report = stabkit.analyze(Slope(), X[:, :1], X[:, 1:], loss=lambda out: (out - 1).square().mean(), spectrum="none")
    assert all(finding.severity == "info" for finding in report.findings)
    assert "matrices that the loss is made of get a gradient that is not zero" in report.summary
