from __future__ import annotations

import math

import pytest
import torch

from stabkit.walk import balanced, drawn, probe_seeds

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [-30, -14, -1, 0, 7, 15])
def test_balancing_takes_out_powers_of_two_exactly(dtype, power):
    torch.manual_seed(0)
    numbers = (torch.randint(1, 64, (3, 5, 2)).double() / 64).to(dtype)
    scaled = numbers if dtype == torch.float16 and power < -14 else numbers * 2.0**power
    found = balanced(scaled)
    assert torch.equal(found.columns.double() * torch.exp2(found.powers).unsqueeze(1), scaled.double())
    largest = found.columns.abs().amax(1)
    assert ((largest >= 0.5) & (largest < 1)).all()


def test_the_smallest_and_the_largest_numbers_of_a_dtype_are_balanced():
    for dtype in DTYPES:
        tiny, huge = 2.0 ** math.floor(math.log2(torch.finfo(dtype).smallest_normal)), torch.finfo(dtype).max / 2
        for size in (tiny / 4, tiny, huge):
            found = balanced(torch.tensor([[[size], [-size / 2]]], dtype=dtype))
            assert 0.5 <= float(found.columns[0, 0, 0]) < 1
            assert float(found.log_norms) == pytest.approx(math.log(size) + 0.5 * math.log(1.25), rel=1e-3)


def test_every_sample_and_column_has_a_power_of_its_own():
    columns = torch.tensor([[[1.0, 2.0**-100]], [[2.0**100, 0.0]]])
    found = balanced(columns, torch.tensor([[0.0, 3.0], [0.0, 0.0]], dtype=torch.float64))
    assert found.powers.tolist() == [[1.0, -96.0], [101.0, 0.0]]
    assert found.gone.tolist() == [[False, False], [False, True]]
    assert found.log_norms[0, 1] == pytest.approx(math.log(2.0**-97))
    assert found.log_norms[1, 1] == -math.inf


def test_numbers_that_are_not_finite_are_left_alone():
    found = balanced(torch.tensor([[[math.inf], [1.0]], [[math.nan], [1.0]]]))
    assert found.powers.tolist() == [[0.0], [0.0]]
    assert found.columns[0, 0, 0] == math.inf
    assert not found.gone.any()


def test_random_columns_are_those_of_their_seeds():
    from stabkit.tracing import trace

    space = trace(torch.nn.Tanh(), torch.ones(3, 4)).states[0].space
    together = drawn(space, probe_seeds(7, 3))
    assert together.shape == (3, 4, 3)
    for i, seed in enumerate([7, 1_000_010, 2_000_013]):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(together[..., i], torch.randn(3, 4, generator=generator, dtype=torch.float64).float())
    assert drawn(space, ()).shape == (3, 4, 0)
