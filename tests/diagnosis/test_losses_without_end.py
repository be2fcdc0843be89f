"""A loss without a lower end is told, with the term that falls; one that is only negative, or falls far, is not."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.losses.signs import signs_of
from stabkit.diagnosis.losses.terms import evaluated
from stabkit.diagnosis.remedies.applying import carry_out
from tests.diagnosis.losses_without_end import BROKEN, HEALTHY, Make, drawn


def said(make: Make) -> list[Finding]:
    model, x, loss = make()
    return [finding for finding in examine(stabkit.trace(model, x), loss).findings if serious(finding)]


@pytest.mark.parametrize("name", BROKEN)
def test_a_loss_without_end_is_told_and_nothing_else(name):
    (found,) = said(BROKEN[name])
    assert found.kind == "loss"
    ends = "logits" in name or "exp(-s)" in name  # a pole, or weights that end at zero
    assert found.severity == ("warning" if ends else "critical")


@pytest.mark.parametrize("name", HEALTHY)
def test_a_loss_with_an_end_or_one_of_two_players_is_no_fault(name):
    assert said(HEALTHY[name]) == []


#: what falls, and what its sign turned makes of the loss: that of the twin which is right
TURNED = {
    "a flow with its log-determinant subtracted": ("chunk", "a flow"),
    "a VAE with the KL subtracted": ("exp", "a VAE"),
    "a mean squared error maximised": ("", ""),
}


@pytest.mark.parametrize("name", TURNED)
def test_the_term_that_falls_is_named_and_its_sign_turned(name):
    (found,) = said(BROKEN[name])
    term, twin = TURNED[name]
    assert (
        re.search(rf"the term of {term} \(\w+_without_end\.py:", found.evidence)
        if term
        else "the term" not in found.evidence
    )
    assert "turned the same steps take it from" in found.evidence
    if name.startswith("a flow"):
        model, x, loss = HEALTHY[twin]()
        assert f"from {float(loss(model(x)).detach()):.3g} to" in found.evidence


def test_weights_that_are_trained_are_named_and_tried_held():
    (found,) = said(BROKEN["free weights of tasks"])
    assert found.evidence.startswith("task_weights multiply terms of the loss")
    assert "with weights of 1 that are held" in found.evidence
    assert "exp(-s) * L + s" in found.remedy


def test_a_pole_is_told_with_a_sigmoid_that_is_carried_out():
    model, x, loss = BROKEN["dice of logits"]()
    (found,) = said(BROKEN["dice of logits"])
    assert "jumps from plus to minus infinity" in found.evidence
    assert abs(float(loss(model(x) + found.numbers["shift"]).detach())) > 10
    carry_out(model, found.actions)
    assert float(model(x).detach().min()) > 0
    assert [f for f in examine(stabkit.trace(model, x), loss).findings if serious(f)] == []


@pytest.mark.parametrize("name", ["free weights of tasks", "weights that the loss holds itself", "a VAE"])
def test_the_model_and_the_loss_stay_as_they_are(name):
    model, x, loss = (BROKEN | HEALTHY)[name]()
    held = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    before = [(id(p), p.data_ptr(), copy.deepcopy(p.data)) for p in held]
    examine(stabkit.trace(model, x), loss)
    assert all(
        id(p) == i and p.data_ptr() == at and bool((p == old).all())
        for p, (i, at, old) in zip(held, before, strict=True)
    )


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_of_the_loss_change_nothing(scale):
    for table, name in ((BROKEN, "a VAE with the KL subtracted"), (HEALTHY, "Gaussian likelihood by hand")):
        model, x, loss = table[name]()
        found = examine(stabkit.trace(model, x), lambda out, loss=loss: scale * loss(out)).findings
        assert [f.kind for f in found if serious(f)] == ["loss"] * (table is BROKEN)


def test_terms_add_up_to_the_loss():
    for name in ("a flow", "a VAE", "Kendall with sigma squared", "a chain of labels", "A2C with an entropy bonus"):
        model, x, loss = HEALTHY[name]()
        torch.manual_seed(0)
        done = evaluated(stabkit.trace(model, x).forward_pass, loss)
        parts = torch.stack([term.part for term in done.terms]).sum()
        gradients = [torch.autograd.grad(each, list(model.parameters()), retain_graph=True) for each in
                     (done.loss, parts)]  # fmt: skip
        # but for constants
        assert all(torch.allclose(one, two, atol=1e-5, rtol=1e-4) for one, two in zip(*gradients, strict=True)), name


X = drawn(4, 3).requires_grad_()
ENDS: dict[str, tuple[Any, bool, bool]] = {
    "a square less a sigmoid": (lambda: (X**2).mean() - X.sigmoid().sum(), True, False),
    "one less a dice": (lambda: 1 - X.sigmoid().mean(), True, True),
    "minus an error": (lambda: -functional.mse_loss(X, torch.zeros(4, 3)), False, True),
    "a likelihood": (lambda: functional.cross_entropy(X, torch.arange(4) % 3), True, False),
    "a hinge": (lambda: functional.relu(1 - X).sum(), True, False),
    "a score": (lambda: X.sum(), False, False),
    "a smaller one": (lambda: torch.minimum(X, X**2).mean(), False, False),
    "a larger one": (lambda: torch.maximum(X, X**2).mean(), True, False),
    "a product of an error with a weight": (lambda: X[0, 0] * (X**2).sum(), False, False),
    "of two that are positive": (lambda: X[0, 0].exp() * (X**2).sum(), True, False),
    "an absolute value by a table of weights": (lambda: (torch.rand(4, 3) * X.abs()).sum(), True, False),
    "powers that each have their own": (lambda: (X.exp() ** torch.rand(4, 3)).sum(), False, False),
    "a clamp": (lambda: X.clamp(-1, 4).mean(), True, True),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_is_known_of_ends_is_so(name):
    make, below, above = ENDS[name]
    signs = signs_of(make().grad_fn)
    assert (signs.below, signs.above) == (below, above)
