"""Losses that fail are refused with what it means and the nearest mend."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.errors import TraceError
from stabkit.tracing.cutting.endpoints import scalar_loss


def test_labels_that_begin_at_one_are_told():
    labels = torch.tensor([1, 2, 3, 4])
    with pytest.raises(TraceError, match=r"Target 4 is out of bounds.*take labels - 1"):
        stabkit.analyze(nn.Linear(3, 4), torch.randn(4, 3), loss=lambda out: functional.cross_entropy(out, labels))


class Rollout(nn.Module):
    """Writes every state into one tensor, which the gradient needs as it was."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.field, self.together = nn.Linear(2, 2), together

    def forward(self, x):
        states = [x]
        path = torch.zeros(len(x), 5, 2)
        path[:, 0] = x
        for i in range(4):
            before = states[-1] if self.together else path[:, i]
            states.append(before + 0.1 * torch.tanh(self.field(before)))
            path[:, i + 1] = states[-1]
        return torch.stack(states, 1) if self.together else path


def test_what_is_written_to_after_it_was_used_is_told():
    torch.manual_seed(0)
    loss = lambda out: out.square().mean()  # noqa: E731
    with pytest.raises(TraceError, match=r"backward pass of the loss fails, as it does in training.*torch.stack"):
        stabkit.analyze(Rollout(False), torch.randn(4, 2), loss=loss, spectrum="none")
    assert stabkit.analyze(Rollout(True), torch.randn(4, 2), loss=loss, spectrum="none").verdict != "non-finite"


def test_a_loss_that_leads_back_to_a_tensor_of_its_own_is_told_with_the_parameters_that_it_leaves():
    torch.manual_seed(0)
    target = (torch.rand(6, 1) > 0.5).float()

    def dice(out, hard):
        made = (out.sigmoid() > 0.5).float().requires_grad_() if hard else out.sigmoid()
        return 1 - 2 * (made * target).sum() / (made.sum() + target.sum() + 1)

    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)
    report = stabkit.analyze(model, x, loss=lambda out: dice(out, True), spectrum="none")
    (found,) = report.findings
    assert (found.kind, found.severity) == ("no_gradient", "critical")
    assert "a tensor that was made inside of it" in found.evidence
    assert "4 parameters" in found.evidence
    assert not stabkit.analyze(model, x, loss=lambda out: dice(out, False), spectrum="none").findings


def test_a_parameter_that_is_an_output_is_no_tensor_of_the_loss_itself():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.log_deviation = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.layer(x), self.log_deviation

    with torch.enable_grad():
        output = Wide()(torch.randn(4, 3))
    assert scalar_loss(lambda out: out[1].square().sum(), output).requires_grad
    with pytest.raises(TraceError, match="made inside of it"):
        scalar_loss(lambda out: (out[0] > 0).float().requires_grad_().sum(), output)
