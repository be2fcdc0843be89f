"""The search with the few vectors that there is memory for in large models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stabkit.curvature.lanczos import Eigenpairs, largest

N = 2000


def found_on(diagonal: Tensor, rows: int, tol: float = 1e-3, most: int = 400) -> Eigenpairs:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(diagonal), generator=generator).to(diagonal)
    start = start / start.norm() + diagonal * start.roll(1) / (diagonal * start.roll(1)).norm()

    def product(v: Tensor, out: Tensor) -> Tensor:
        return torch.mul(v, diagonal, out=out)

    return largest(product, len(diagonal), 1, tol=tol, start=start, rows=rows, max_products=most)


def two_sided(power: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values on both sides of 0 that lie the closer, the smaller the power."""
    sizes = torch.arange(1, N // 2 + 1, dtype=dtype) ** -power
    return torch.cat([98 * sizes, -100 * sizes])


@pytest.mark.parametrize("power", [0.03, 0.1, 0.2, 0.7])
def test_four_rows_take_hardly_more_products_than_twenty(power: float) -> None:
    few, many = found_on(two_sided(power), 4), found_on(two_sided(power), 20)
    assert few.converged.all()
    assert abs(few.values[0] - 98) <= 0.1
    assert few.n_products <= 1.3 * many.n_products + 4


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_what_is_told_holds(dtype: torch.dtype, tol: float) -> None:
    d = two_sided(0.1, dtype)
    found = found_on(d, 4, tol)
    x = found.vectors[0]
    assert found.converged.all()
    assert abs(found.values[0] - 98) <= 100 * tol
    assert abs(float(x.norm()) - 1) < 1e-5
    real = float((d * x - found.values[0] * x).double().norm())
    assert np.isclose(real, found.residuals[0], rtol=0.1, atol=1e-4)
    assert found.asymmetry < 1e-4
    assert -100 - 1e-3 <= found.lowest < 0


def test_where_it_stops_it_says_so() -> None:
    found = found_on(two_sided(0.03), 4, 1e-5, most=9)
    assert not found.converged.any()
    assert found.n_products == 9
    assert found.values[0] < 98


def test_repeated_values_and_ones_below_zero() -> None:
    several = torch.cat([torch.full((5,), 7.0), torch.linspace(-9, 6, N)])
    assert abs(found_on(several, 4).values[0] - 7) <= 9e-3
    below = found_on(torch.linspace(-50, -3, N), 4)
    assert below.converged.all()
    assert abs(below.values[0] + 3) <= 5e-2


def test_an_operator_that_is_not_symmetric_is_seen() -> None:
    matrix = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))

    def product(v: Tensor, out: Tensor) -> Tensor:
        return torch.mv(matrix, v, out=out)

    start = torch.randn(60, generator=torch.Generator().manual_seed(2))
    assert largest(product, 60, 1, tol=1e-3, start=start, rows=4, max_products=20).asymmetry > 0.1


def test_a_product_that_ends_in_nan_is_refused() -> None:
    made = 0
    d = two_sided(0.03)

    def product(v: Tensor, out: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return torch.mul(v, d if made < 7 else d * np.nan, out=out)

    start = torch.randn(N, generator=torch.Generator().manual_seed(2))
    with pytest.raises(Exception, match="not finite"):
        largest(product, N, 1, tol=1e-5, start=start, rows=4, max_products=20)
