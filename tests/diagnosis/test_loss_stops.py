"""A loss that ends its gradient is told with the operation that does, where it stands, and a remedy for that one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding

LABELS = (torch.arange(24) % 2).float()[:, None]


def batch() -> Tensor:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(1))


def model(bias: float = 0.0, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))
    with torch.no_grad():
        layers[2].bias[0] += bias
    return layers


def first(loss: Callable[[Tensor], Tensor], network: nn.Module) -> Finding:
    found: Finding = stabkit.analyze(network, batch(), loss=loss, spectrum="none").findings[0]
    return found


class Overlap(nn.Module):
    """An overlap of what lies above a threshold."""

    def forward(self, out: Tensor) -> Tensor:
        above = (out > 0).float()
        return 1 - (above * LABELS).sum() / (above + LABELS).sum()


@pytest.mark.parametrize(
    ("loss", "network", "said", "remedy"),
    [
        (lambda o: functional.mse_loss(o.sigmoid().round(), LABELS), model(), "round (test_", "round for the report"),
        (lambda o: functional.mse_loss(o.sigmoid(), 0 * LABELS), model(200), "sigmoid (test_", "_with_logits"),
        (lambda o: functional.mse_loss(o.tanh(), -1 - LABELS), model(50), "tanh (test_", "what goes into tanh"),
        (lambda o: (o.softmax(1)[:, 1] - 1).square().mean(), model(300, 2), "softmax (test_", "cross_entropy"),
        (
            lambda o: (1 - o.sigmoid().where(o > 9, torch.tensor(0.0))).mean(),
            model(),
            "where (test_",
            "the condition of where",
        ),
        (lambda o: 1 + (0 * LABELS * o.square()).mean(), model(), "mul (test_", "what multiplies"),
        (lambda o: (o.argmax(1) - LABELS[:, 0]).square().mean(), model(0, 2), "argmax (test_", "cross_entropy"),
        (lambda o: (o.max(1)[1] != LABELS[:, 0]).float().mean(), model(0, 2), "indices of max", "cross_entropy"),
        (Overlap(), model(), "gt (Overlap.forward, test_", "in the place of the threshold"),
        (lambda o: functional.mse_loss(o.detach(), LABELS).requires_grad_(), model(), "detach (test_", "take the det"),
        (lambda o: torch.tensor(o.mean().item(), requires_grad=True), model(), "item() (test_", "stay within torch"),
    ],
)
def test_what_ends_the_gradient(loss: Callable[[Tensor], Tensor], network: nn.Module, said: str, remedy: str) -> None:
    found = first(loss, network)
    assert found.severity == "critical"
    assert f"it ends at {said}" in found.evidence or f"it ends at the {said}" in found.evidence
    assert remedy in found.remedy


def test_an_output_given_to_another_network_without_its_graph() -> None:
    critic = nn.Linear(1, 1)
    found = first(lambda o: functional.softplus(-critic(o.detach())).mean(), model())
    assert "parameters of another network alone" in found.evidence
    assert "it ends at detach" in found.evidence


def test_a_flat_sigmoid_is_told_once() -> None:
    network = nn.Sequential(*model(30.0), nn.Sigmoid())

    def loss(out: Tensor) -> Tensor:
        return functional.binary_cross_entropy(out.clamp(1e-4, 1 - 1e-4), 0 * LABELS)

    found = stabkit.analyze(network, batch(), loss=loss, spectrum="none").findings
    assert [f.kind for f in found if f.severity != "info"] == ["saturated"]


def test_a_power_whose_exponent_is_trained_over_negative_numbers() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer, self.p = nn.Linear(6, 16), nn.Linear(16, 1), nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x) ** self.p)

    found = first(lambda o: functional.mse_loss(o, LABELS), Pooled())
    assert found.kind == "non_finite"
    assert "by its exponent holds the logarithm of its base" in found.evidence
    assert "clamp(min=eps)" in found.remedy
