"""Outputs that a self-supervised loss has made constant, and losses of several outputs in general."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding
from tests.tracing.test_following import Autoencoder, Flows


class Siamese(nn.Module):
    def __init__(self, norm: bool, predict: bool) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(32)] if norm else []
        self.encoder = nn.Sequential(
            nn.Linear(16, 32), *norms, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
        )
        self.predictor = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) if predict else nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one, two = self.encoder(a), self.encoder(b)
        return self.predictor(one), self.predictor(two), one, two


def views(count: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 16)
    return x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)


def alike(output: tuple[Tensor, ...]) -> Tensor:
    one, two, a, b = output
    return -0.5 * (functional.cosine_similarity(one, b) + functional.cosine_similarity(two, a)).mean()


def alike_without_gradient(output: tuple[Tensor, ...]) -> Tensor:
    one, two, a, b = output
    return alike((one, two, a.detach(), b.detach()))


def contrasted(output: tuple[Tensor, ...]) -> Tensor:
    a, b = (functional.normalize(tensor, dim=1) for tensor in output[:2])
    return functional.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def trained(norm: bool, predict: bool, loss, steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Siamese(norm, predict)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(*views())).backward()
        optimizer.step()
    return model, views()


def collapses(model: nn.Module, inputs: tuple[Tensor, ...], loss) -> list[Finding]:
    report = stabkit.analyze(model, *inputs, loss=loss, spectrum="none")
    return [finding for finding in report.findings if finding.kind == "rank_collapse"]


@pytest.mark.parametrize(("norm", "predict"), [(True, True), (False, False)])
def test_a_network_that_learnt_a_constant_is_told(norm, predict):
    (found,) = collapses(*trained(norm, predict, alike, 300), alike)
    assert found.severity == "warning"
    assert found.numbers["after"] < 0.01 < found.numbers["before"]
    assert "stop the gradient" in found.remedy
    assert found.module_path.startswith("encoder") or found.module_path == "predictor"


@pytest.mark.parametrize(
    ("loss", "steps"),
    [(alike, 0), (alike_without_gradient, 0), (contrasted, 0), (contrasted, 200)],
)
def test_a_network_that_tells_samples_apart_or_will_is_not(loss, steps):
    assert collapses(*trained(True, True, loss, steps), loss) == []


def test_outputs_that_lie_near_their_mean_by_their_targets_are_no_collapse():
    torch.manual_seed(0)
    model, x = Autoencoder(), torch.randn(32, 10)
    target = x + 100.0
    with torch.no_grad():
        model.decoder[2].bias.fill_(100.0)
        model.mean.bias.fill_(50.0)
        model.log_variance.bias.fill_(-50.0)
        model.decoder[0].weight.mul_(0.01)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        decoded, mean, log_variance = output
        return (decoded - target).square().mean() + 1e-6 * (mean.square().mean() + log_variance.square().mean())

    assert collapses(model, (x,), loss) == []


class Unconstrained(Flows):
    """Couplings whose scale may be negative, with its logarithm."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logarithm = torch.zeros(len(x), dtype=x.dtype)
        for net in self.nets:
            fixed, moved = x.chunk(2, 1)
            shift, scale = net(fixed).chunk(2, 1)
            x, logarithm = torch.cat([moved * scale + shift, fixed], 1), logarithm + scale.log().sum(1)
        return {"z": x, "logarithm": logarithm}


@pytest.mark.parametrize("model", [Flows, Unconstrained])
def test_a_density_is_analysed_with_its_log_determinant(model):
    torch.manual_seed(0)
    report = stabkit.analyze(
        model(),
        torch.randn(16, 4),
        loss=lambda out: (out["z"].square().sum(1) - out["logarithm"]).mean(),
        spectrum="none",
    )
    assert any("2 outputs" in note for note in report.notes)
    found = [finding for finding in report.findings if finding.kind == "non_finite"]
    if model is Flows:
        assert not found
    else:
        assert "a logarithm of negative numbers" in found[0].evidence
        assert "log |det|" in found[0].remedy


def test_diagnose_follows_the_loss_by_itself():
    torch.manual_seed(0)
    x = torch.randn(8, 10)
    flow = stabkit.trace(Autoencoder(), x)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (output[0] - x).square().mean() + output[1].square().mean() + output[2].square().mean()

    assert [f for f in stabkit.diagnose(flow, loss) if f.severity != "info"] == []
