"""A rare class that is not predicted, and would be if it weighed as much as the others, is named; no other is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding
from stabkit.diagnosis.losses.unequal_classes import unequal_class_findings
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.training_pass import training_pass

Loss = Callable[[Tensor], Tensor]
Case = tuple[nn.Module, Tensor, Loss]


def samples(apart: float, rare: int = 12, count: int = 700) -> tuple[Tensor, Tensor]:
    """Samples of two classes, so many spreads apart, and which are of the rare one."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.zeros(count)
    labels[:: count // rare] = 1.0
    x = torch.randn(count, 6, generator=generator)
    x[:, 0] += apart * labels
    return x, labels


def network(outputs: int, last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, outputs), last or nn.Identity())


def binary(apart: float, weight: float | None = None) -> Case:
    x, labels = samples(apart)
    by = None if weight is None else torch.tensor(weight)
    return (
        network(1),
        x,
        lambda out: functional.binary_cross_entropy_with_logits(out.squeeze(1), labels, pos_weight=by),
    )


def probabilities(apart: float) -> Case:
    x, labels = samples(apart)
    criterion = nn.BCELoss()
    return network(1, nn.Sigmoid()), x, lambda out: criterion(out[:, 0], labels)


def classes(apart: float) -> Case:
    x, labels = samples(apart)
    return network(2), x, lambda out: functional.cross_entropy(out, labels.long())


def masks(contrast: float) -> Case:
    """Images with a bright spot, and where it is."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.zeros(10, 1, 12, 12)
    for image, (row, column) in enumerate(torch.randint(1, 10, (10, 2), generator=generator).tolist()):
        wanted[image, 0, row : row + 2, column] = 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 1))
    x = contrast * wanted + torch.randn(wanted.shape, generator=generator)
    return model, x, lambda out: functional.binary_cross_entropy_with_logits(out, wanted)


def focal(apart: float) -> Case:
    x, labels = samples(apart)

    def loss(out: Tensor) -> Tensor:
        each = functional.binary_cross_entropy_with_logits(out.squeeze(1), labels, reduction="none")
        return (torch.where(labels > 0, 0.98, 0.02) * each * (1 - (-each).exp()).square()).mean()

    return network(1), x, loss


MISSED = {
    "binary": binary(2.2),
    "probabilities": probabilities(2.2),
    "classes": classes(2.2),
    "masks": masks(1.5),
}
HEALTHY = {
    "told all the same": binary(8.0),
    "classes told all the same": classes(8.0),
    "spots told all the same": masks(12.0),
    "weighed": binary(2.2, 60.0),
    "focal": focal(2.2),
    "nothing to tell them by": binary(0.0),
}


def said(case: Case) -> list[Finding]:
    model, x, loss = case
    flow = stabkit.trace(model, x)
    run = TrainingRun(flow, loss, flow.forward_pass, training_pass(flow.forward_pass, loss))
    return unequal_class_findings(run, ())


@pytest.mark.parametrize("name", MISSED)
def test_a_rare_class_that_weights_would_find_is_named(name: str):
    (found,) = said(MISSED[name])
    assert found.severity == "warning"
    assert "class 0 is as good as all that is predicted" in found.evidence
    assert "weigh the classes" in found.remedy
    assert found.numbers["weighed"] > found.numbers["found"] + 0.3


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_found_or_weighed_or_noise_raises_nothing(name: str):
    assert not said(HEALTHY[name])


def test_the_diagnosis_says_so():
    model, x, loss = binary(2.2)
    assert any("weigh the classes" in f.remedy for f in stabkit.diagnose(stabkit.trace(model, x), loss))
