"""One step, written in many ways: the reading depends on what is computed, not on how it is spelled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import Step, dense, stack

WIDTH = 6
Z = np.random.default_rng(0).normal(size=(100, 2)) @ np.array([1, 1j])
WEIGHTS = torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6], dtype=torch.float64)


def read(spelling):
    """The second of three steps x' = spelling(f, x), and its stability function at the test problem f(x) = z x."""
    torch.manual_seed(0)
    make = lambda: Step(lambda m, x: spelling(m.parts[0], x), dense(WIDTH))  # noqa: E731
    model, inputs, _ = stack(make, (3, WIDTH))()
    record = identify(trace(model, *inputs, depth=["0", "1", "2"]))[1]
    return record, record.method.stability_matrix(record.step_size * Z)[:, 0, 0]


def product(f, x, **factors):
    """The last layer of a branch and the skip in one operation."""
    return torch.addmm(x, torch.tanh(f[0](x)), f[2].weight.T, **factors)


def written_by_index(f, x):
    y, index = x.clone(), torch.arange(WIDTH)
    y[:, index] = x[:, index] + f(x)[:, index]
    return y


EULER = {
    "sum of a stack": (lambda f, x: torch.stack([x, f(x)]).sum(0), 1, 1),
    "mean of a stack": (lambda f, x: 2 * torch.stack([x, f(x)], -1).mean(-1), 1, 1),
    "sum of a reshaped concatenation": (lambda f, x: torch.cat([x, f(x)], -1).view(3, 2, WIDTH).sum(1), 1, 1),
    "einsum": (lambda f, x: torch.einsum("k,kbd->bd", WEIGHTS[:2], torch.stack([x, f(x)])), 1 / 6, 1 / 3),
    "matrix product": (lambda f, x: torch.stack([x, f(x)], -1) @ WEIGHTS[:2], 1 / 6, 1 / 3),
    "running sum": (lambda f, x: torch.cumsum(torch.stack([x, f(x)]), 0)[-1], 1, 1),
    "addmm": (product, 1, 1),
    "addmm with factors": (lambda f, x: product(f, x, beta=0.5, alpha=0.1), 0.5, 0.1),
    "addmm of the state with itself": (lambda f, x: torch.addmm(x, x, f[0].weight, alpha=0.1), 1, 0.1),
    "addcdiv": (lambda f, x: torch.addcdiv(x, f(x), torch.full_like(x, 4.0), value=2), 1, 0.5),
    "addcmul": (lambda f, x: torch.addcmul(x, f(x), torch.full_like(x, 4.0), value=0.1), 1, 0.4),
    "index_add": (lambda f, x: x.index_add(1, torch.arange(WIDTH), f(x), alpha=0.5), 1, 0.5),
    "scatter_add": (lambda f, x: x.scatter_add(1, torch.arange(WIDTH).expand(3, -1), f(x)), 1, 1),
    "written by index": (written_by_index, 1, 1),
    "identity matrix": (lambda f, x: x @ torch.eye(WIDTH, dtype=x.dtype) + f(x), 1, 1),
    "scaled before and after": (lambda f, x: (2 * x + 2 * f(x)) / 2, 1, 1),
    "divided after the sum": (lambda f, x: (3 * x + f(x)) / 3, 1, 1 / 3),
    "scaled state": (lambda f, x: 0.5 * x + f(0.5 * x), 0.5, 0.5),
}


@pytest.mark.parametrize("spelling", EULER)
def test_a_skip_and_a_branch(spelling):
    function, a, c = EULER[spelling]
    record, R = read(function)
    assert record.skip == pytest.approx(a, abs=1e-12)
    if spelling == "scaled state":  # the factor before a field that is used once belongs to the field
        c = 1.0
    assert np.abs(R - (a + c * Z)).max() < 1e-8


def stages(f, x, h=0.3):
    k = [f(x)]
    for c in (0.5, 0.5, 1.0):
        k.append(f(x + h * c * k[-1]))
    return k, h


def preallocated(f, x, h=0.3):
    k = torch.zeros(4, *x.shape, dtype=x.dtype)
    k[0] = f(x)
    for i, c in enumerate((0.5, 0.5, 1.0)):
        k[i + 1] = f(x + h * c * k[i])
    return x + h * (WEIGHTS.view(4, 1, 1) * k).sum(0)


def with_stages(combine):
    def spelling(f, x):
        k, h = stages(f, x)
        return x + h * combine(k)

    return spelling


RK4 = {
    "einsum": with_stages(lambda k: torch.einsum("s,s...->...", WEIGHTS, torch.stack(k))),
    "tensordot": with_stages(lambda k: torch.tensordot(WEIGHTS, torch.stack(k), 1)),
    "weighted sum of a stack": with_stages(lambda k: (torch.stack(k, -1) * WEIGHTS).sum(-1)),
    "matrix product": with_stages(lambda k: torch.stack(k, -1) @ WEIGHTS),
    "preallocated stages": preallocated,
}


@pytest.mark.parametrize("spelling", RK4)
def test_stages_combined_along_a_dimension(spelling):
    record, R = read(RK4[spelling])
    assert (record.name, record.step_size) == ("rk4", pytest.approx(0.3))
    z = 0.3 * Z
    assert np.abs(R - (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24)).max() < 1e-8


def test_a_skip_that_only_a_measurement_shows_says_so():
    record, _ = read(EULER["running sum"][0])
    assert record.evidence == "measured"
    assert "Cumsum" in record.notes[0]


def test_a_compiled_operation_without_a_name_may_hide_a_skip():
    torch.manual_seed(0)
    make = lambda: Step(lambda m, x: torch._foreach_add([x], [m.parts[0](x)], alpha=0.4)[0], dense())  # noqa: E731
    model, inputs, _ = stack(make)()
    record = identify(trace(model, *inputs, depth=["0", "1", "2"]))[1]
    assert (record.name, record.evidence, record.method) == ("unknown", "unknown", None)


def test_mixing_tokens_is_no_combination_of_stages():
    record, _ = read(lambda f, x: torch.full((3, 3), 1 / 3, dtype=x.dtype) @ torch.stack([f(x), x]).sum(0))
    assert (record.name, record.skip) == ("plain", 0.0)


def test_a_weight_and_its_transpose_are_two_fields():
    def spelling(f, x):
        W = f[0].weight
        return x + torch.tanh(x @ W) + torch.tanh(x @ W.T)

    record, _ = read(spelling)
    assert record.shared_weights is False
    assert record.method.n_fields == 2
