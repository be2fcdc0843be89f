from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import stabkit
from stabkit.errors import TraceError
from stabkit.growth import covariant_vectors, lyapunov_spectrum
from tests.growth import systems
from tests.growth.systems import DOUBLE, normal


def assert_commutes(step_of, flow, found, tolerance=1e-9):
    """The flow carries each vector into the next one, up to sign, with the growth that is given."""
    for index in range(len(found.growth)):
        place = found.start + index
        points = flow.states[place].tensors[0]
        step = step_of(place)
        J = torch.stack([jacobian(lambda x, step=step: step(x.unsqueeze(0))[0], x) for x in points])
        carried = J @ found.vectors[index]
        lengths = carried.norm(dim=1)
        torch.testing.assert_close(lengths.log(), found.growth[index], rtol=0, atol=tolerance)
        cosines = (carried / lengths.unsqueeze(1) * found.vectors[index + 1]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=tolerance)


def test_vectors_of_the_henon_map_commute_with_it():
    flow = systems.henon(120, 2)
    found = covariant_vectors(flow)
    assert (found.start, len(found.vectors)) == (30, 61)
    assert_commutes(lambda _: systems.henon_step, flow, found)
    assert found.growth.mean(0)[:, 0].min() > 0
    torch.testing.assert_close(found.angles(), found.splitting(1), rtol=0, atol=1e-6)


def test_vectors_do_not_depend_on_the_random_frames():
    flow = systems.lorenz(3000, 1)
    a, b = (covariant_vectors(flow, discard=1200, seed=seed) for seed in (0, 1))
    for first, second in zip(a.vectors, b.vectors, strict=True):
        cosines = (first * second).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)
    field = systems.lorenz_field(flow.states[1500].tensors[0])  # the direction of the flow itself is neutral
    neutral = a.vectors[300][0, :, 1]
    assert abs(float((field[0] / field.norm()) @ neutral)) > 1 - 1e-4


def test_vectors_of_a_linear_map_are_its_eigenvectors():
    A = torch.diag(torch.tensor([2.0, 0.9, 0.3], dtype=DOUBLE)) + 0.2 * normal(3, 3)
    values, vectors = torch.linalg.eig(A)
    order = values.abs().argsort(descending=True)
    exact = vectors[:, order].real
    found = covariant_vectors(systems.linear(A, 200)).vectors[50][0]
    torch.testing.assert_close((found * exact).sum(0).abs(), torch.ones(3, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_vectors_over_depth_also_where_products_are_the_only_way_in():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(16)]).double()
    flow = stabkit.trace(model, normal(2, 6))
    found = covariant_vectors(flow, 3)
    assert_commutes(lambda place: model[place], flow, found)
    spectrum = lyapunov_spectrum(flow, 3, direction="forward")
    assert abs(float(found.growth.mean() - spectrum.local_growth[4:12].mean())) < 0.3


def test_tangencies_have_angle_zero():
    flow = systems.jordan(400)
    angles = covariant_vectors(flow).angles()
    assert angles.max() < 0.02
    assert angles.min() >= 0
    assert abs(float(covariant_vectors(systems.cat_map(60)).angles().mean()) - math.pi / 2) < 1e-6


def test_what_has_no_way_back_is_refused():
    flow = stabkit.iterate(lambda x: x * torch.tensor([1.0, 0.0], dtype=DOUBLE), normal(1, 2), 20)
    with pytest.raises(TraceError, match="singular"):
        covariant_vectors(flow)
    with pytest.raises(TraceError, match="discard=10"):
        covariant_vectors(flow, 1, discard=10)
