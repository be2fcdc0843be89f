from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.tracing.cutting.samples import Layout, candidates, is_scaled, scale, scales
from stabkit.tracing.graph.values import Meta


def meta(*shape: int) -> Meta:
    return Meta(shape, torch.float32, torch.device("cpu"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_columns_and_tensor_are_inverse(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    batch, outer = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    shape[axis] *= batch
    layout = Layout(batch, axis, outer)
    tensor = torch.randn(*shape, 2)  # one trailing dimension more than the value has
    columns = layout.columns(tensor, shape)
    assert columns.shape == (batch, tensor.numel() // batch // 2, 2)
    assert torch.equal(layout.tensor(columns, shape), tensor)


@pytest.mark.parametrize(
    ("layout", "first"),
    [
        (Layout(2, 0), [0, 1, 2, 3, 4, 5]),  # blocks of rows
        (Layout(2, 0, outer=False), [0, 1, 2, 6, 7, 8]),  # every second row
        (Layout(3, 1), [0, 3, 6, 9]),  # columns
        (Layout(1, None), list(range(12))),
    ],
)
def test_columns_hold_the_entries_of_one_sample(layout, first):
    tensor = torch.arange(12).view(4, 3)
    assert layout.columns(tensor, (4, 3))[0].tolist() == first


def test_the_shape_of_one_sample_drops_or_divides_the_sample_axis():
    assert Layout(2, 0).sample_shape((2, 5)) == (5,)
    assert Layout(2, 1).sample_shape((7, 2, 5)) == (7, 5)
    assert Layout(2, 0).sample_shape((8, 5)) == (4, 5)
    assert Layout(1, None).sample_shape((8, 5)) == (8, 5)


def test_candidates_prefer_the_given_axis_then_exact_sizes():
    assert candidates(meta(4, 2, 2), batch=2, first=1)[0] == Layout(2, 1)
    assert candidates(meta(4, 2, 2), batch=2)[0] == Layout(2, 1)  # axis 0 holds more than samples
    assert candidates(meta(5, 3), batch=2) == []
    assert candidates(meta(5, 3), batch=1) == [Layout(1, None)]


def test_scaling_tells_the_samples_apart():
    layout, factors = Layout(2, 0, outer=False), scales(2, seed=0)
    tensor = torch.randn(6, 3)
    scaled = scale(tensor, layout, factors)
    assert is_scaled(scaled, tensor, layout, factors, 1e-12)
    assert not is_scaled(scaled, tensor, Layout(2, 0), factors, 1e-3)  # read in blocks, the factors do not fit
    mixed = scaled + 1e-3 * scaled.flip(0)
    assert not is_scaled(mixed, tensor, layout, factors, 1e-4)


def test_up_to_eight_samples_have_factors_of_their_own():
    assert len(set(scales(8, seed=3).tolist())) == 8
    assert (scales(100, seed=3).log2() % 1 == 0).all()
