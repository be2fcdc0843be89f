from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.operators.sparsity import axis_colors


def shares(tables: list[np.ndarray], i: int, j: int) -> bool:
    return all(bool((table[i] & table[j]).any()) for table in tables)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.lists(st.integers(1, 8), min_size=1, max_size=2), st.integers(0, 10_000), st.floats(0, 1))
def test_no_two_of_a_color_share_a_column(size, widths, seed, density):
    generator = np.random.default_rng(seed)
    reach = tuple(tuple(generator.random((size, width)) < density for width in widths) for _ in range(2))
    colors = axis_colors(reach)
    assert sorted(set(colors)) == list(range(colors.max() + 1))
    for i in range(size):
        for j in range(i):
            assert colors[i] != colors[j] or not any(shares(list(tables), i, j) for tables in reach)


def test_convolutions_need_as_many_colors_as_their_receptive_field():
    offsets = np.subtract.outer(np.arange(30), np.arange(30))
    assert axis_colors(((np.abs(offsets) <= 2,),)).max() == 4
    dilated = np.isin(offsets, [-4, 0, 4])
    assert axis_colors(((dilated,),)).max() == 2


def test_irregular_reaches_are_colored_greedily():
    hub = np.eye(9, dtype=bool)
    hub[:, 0] |= np.arange(9) % 4 == 0  # 0, 4 and 8 share a column
    assert axis_colors(((hub,),)).max() == 2


def test_equal_reaches_need_a_color_each():
    assert axis_colors(((np.ones((5, 2), dtype=bool),),)).tolist() == [0, 1, 2, 3, 4]
