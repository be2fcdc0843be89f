"""Narrow deep networks of ReLUs: a layer that is dead by chance of the draw is told with the width as its cause."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious

X = torch.linspace(-1.7, 1.7, 100)[:, None]


def network(width: int, depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [1, *[width] * (depth - 1), 1]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def said(model: nn.Module) -> list[Finding]:
    def loss(out: Tensor) -> Tensor:
        return functional.mse_loss(out, X.abs())

    return [f for f in examine(stabkit.trace(model, X), loss).findings if serious(f)]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_of_two_that_is_dead(seed):
    (found,) = said(network(2, 10, seed))
    assert (found.kind, found.severity) == ("dead", "critical")
    assert "of these 9 of 2 units one is so in 92% of all draws" in found.evidence
    assert "make the layers wider" in found.remedy
    assert {action["action"] for action in found.actions} == {"activate", "orthogonalise"}


@pytest.mark.parametrize(("width", "depth"), [(64, 4), (8, 4)])
def test_layers_that_are_wide_enough_for_their_depth(width, depth):
    assert said(network(width, depth, 0)) == []
