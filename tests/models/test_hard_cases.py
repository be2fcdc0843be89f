from __future__ import annotations

import warnings

import pytest
import torch

from stabkit.tracing import Flow, trace

from .hard_cases import NOTED, SUBJECTS, TOTALS
from .zoo import Subject, cast, kept_random_state

BY_NAME = {subject.name: subject for subject in SUBJECTS}


def marked(subjects: list[Subject]) -> list:
    """The fast ones run always, the others with the zoo marker."""
    return [pytest.param(s, id=s.name, marks=() if s.fast else pytest.mark.zoo) for s in subjects]


def traced(subject: Subject) -> Flow:
    with warnings.catch_warnings(), kept_random_state():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, args, kwargs = subject.build()
        if subject.dtype is not None:
            model, args, kwargs = cast(model, args, kwargs, subject.dtype)
        return trace(model, *args, kwargs=kwargs, target=subject.target, **subject.options)


def test_names_are_unique_and_known():
    assert len(BY_NAME) == len(SUBJECTS) >= 100
    assert set(NOTED) | set(TOTALS) <= set(BY_NAME)


@pytest.mark.parametrize("subject", marked(SUBJECTS))
def test_hard_case(subject, examined):
    result = examined(subject)
    assert result.passed, result.failure


@pytest.mark.parametrize("subject", marked([BY_NAME[name] for name in TOTALS]))
def test_number_of_steps_where_no_module_counts_them(subject):
    assert len(traced(subject)) == TOTALS[subject.name]


@pytest.mark.parametrize("subject", marked([BY_NAME[name] for name in NOTED]))
def test_a_derivative_that_is_absent_is_named_at_its_step(subject):
    path, words = NOTED[subject.name]
    noted = [step for step in traced(subject).steps if step.notes]
    assert noted
    assert all(step.module_path.startswith(path) for step in noted)
    assert any(words in note for step in noted for note in step.notes)


@pytest.mark.parametrize("subject", marked([s for s in SUBJECTS if s.name not in NOTED]))
def test_ordinary_derivatives_get_no_note(subject):
    flow = traced(subject)
    assert [note for step in flow.steps for note in step.notes] == []


def test_a_forward_without_gradients_is_said_to_be_looked_through():
    assert any("no_grad" in note for note in traced(BY_NAME["@torch.no_grad forward"]).notes)


@pytest.mark.parametrize("subject", marked(SUBJECTS))
def test_products_of_hard_cases(subject):
    """Products with several vectors are those with one, and the forward product is the transpose's transpose."""
    flow = traced(subject)
    operator = flow.jacobian()
    batch, m, n = operator.shape
    exact = operator.dtype == torch.float64 and subject.tolerance <= 1e-10
    tolerance = {"rtol": 1e-8, "atol": 1e-9} if exact else {"rtol": 0.05, "atol": 0.05}
    w = torch.randn(batch, m, 2, dtype=operator.dtype)
    columns = []
    for k in range(2):
        cotangents = [t[0] for t in flow.states[-1].space.unflatten(w[..., [k]])]
        for step in reversed(flow.steps):
            cotangents = step.vjp(cotangents)
        columns.append(flow.states[0].space.flatten([t.unsqueeze(0) for t in cotangents]))
    pulled = torch.cat(columns, dim=2)
    torch.testing.assert_close(operator.T @ w, pulled, **tolerance)
    u = torch.randn(batch, n, 2, dtype=operator.dtype)
    torch.testing.assert_close((w * (operator @ u)).sum(1), (pulled * u).sum(1), **tolerance)
