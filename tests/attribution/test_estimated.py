from __future__ import annotations

import pytest
import torch
from torch import nn

import stabkit
from tests.attribution.networks import gaussian_steps, linear_steps, normal_input


def pair(kind: str = "iid", **options) -> tuple[stabkit.attribution.Attribution, stabkit.attribution.Attribution]:
    """The same flow, exactly and estimated."""
    flow = stabkit.trace(gaussian_steps(kind, cosine=0.3, size=60, depth=6), normal_input(2, 60))
    return stabkit.attribute(flow), stabkit.attribute(flow, dense_limit=10, **options)


@pytest.mark.parametrize("kind", ["iid", "antisymmetric", "symmetric"])
def test_intervals_hold_the_exact_terms(kind):
    exact, estimated = pair(kind, confidence=0.99)
    assert estimated.methods == ("estimated",) * 6
    assert torch.equal(estimated.growth, exact.growth)
    for name in ("spectral", "isotropic"):
        low, high = getattr(estimated, f"{name}_interval").unbind(2)
        value = getattr(exact, name)
        assert bool(((low <= value) & (value <= high)).all()), name
        assert float((high - low).max()) < 0.3


def test_estimates_add_up_as_exactly_as_the_measured_terms():
    _, estimated = pair()
    total = estimated.spectral + estimated.non_normal + estimated.alignment
    torch.testing.assert_close(total, estimated.growth, rtol=0, atol=1e-12)
    split = estimated.mask + estimated.norm + estimated.skip + estimated.dissipation + estimated.branch
    torch.testing.assert_close(split, estimated.isotropic, rtol=0, atol=1e-12)
    assert bool((estimated.non_normal >= 0).all())


def test_more_probes_give_shorter_intervals():
    widths = [float(pair(probes=probes)[1].isotropic_interval.diff(dim=2).mean()) for probes in (4, 64)]
    assert widths[1] < widths[0] / 3


def test_the_outer_eigenvalues_are_those_of_the_matrix():
    exact, estimated = pair("symmetric")
    torch.testing.assert_close(estimated.frozen, exact.frozen, rtol=0, atol=1e-3)
    assert estimated.mechanisms[0].complete is False
    assert estimated.mechanisms[0].energy is None
    assert estimated.mechanisms[0].radius == pytest.approx(exact.mechanisms[0].radius, rel=1e-2)
    assert estimated.mechanisms[0].margin == pytest.approx(exact.mechanisms[0].margin, abs=1e-2)


def test_without_krylov_there_is_no_frozen_rate():
    _, estimated = pair(krylov=0)
    assert bool(estimated.frozen.isnan().all())
    assert estimated.mechanisms[0].margin is None
    assert estimated.predictions["frozen"].steps == 0
    assert estimated.predictions["isotropic"].steps == 6


def test_cosines_of_neighbours_are_estimated_from_the_same_probes():
    exact, estimated = pair(probes=64)
    assert estimated.persistence.mean == pytest.approx(exact.persistence.mean, abs=0.1)


def test_large_transitions_are_estimated_too():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).double()
    flow = stabkit.trace(model, normal_input(2, 40))
    exact, estimated = stabkit.attribute(flow), stabkit.attribute(flow, dense_limit=0, probes=200)
    torch.testing.assert_close(estimated.transition, exact.transition, rtol=0, atol=0.1)
    total = estimated.transition + estimated.alignment
    torch.testing.assert_close(total, estimated.growth, rtol=0, atol=1e-12)


def test_masks_are_estimated():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(40, 40), nn.ReLU()) for _ in range(3)]).double()
    flow = stabkit.trace(model, normal_input(2, 40))
    exact, estimated = stabkit.attribute(flow), stabkit.attribute(flow, dense_limit=0, krylov=0)
    torch.testing.assert_close(estimated.mask, exact.mask, rtol=0, atol=1e-12)  # signs leave a diagonal its norm


def test_a_nan_weight_leaves_no_estimate():
    A = torch.eye(20)
    A[3, 4] = float("nan")
    flow = stabkit.trace(linear_steps(A, A), normal_input(1, 20), check=False)
    found = stabkit.attribute(flow, dense_limit=0)
    assert found.methods == ("none", "none")
    assert bool(found.spectral.isnan().all())
