from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.tracing.samples import Layout, candidates, leaks, one_sample
from stabkit.tracing.values import Meta


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


def test_one_sample_keeps_its_own_entries_and_leaks_sees_the_others():
    tensor, layout = torch.ones(4, 3), Layout(2, 0, outer=False)
    kept = one_sample(tensor, layout, 1)
    assert kept[:, 0].tolist() == [0, 1, 0, 1]
    assert not leaks(kept, layout, 1)
    assert leaks(kept, layout, 0)
    assert leaks(kept, Layout(2, 0), 1)  # read in blocks, the same tensor reaches both samples
