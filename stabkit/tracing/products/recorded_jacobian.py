"""The Jacobian of a recorded segment as an operator that knows what makes its products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.operators.dense import WORTHWHILE, fill_rows
from stabkit.operators.jacobian import Jacobian
from stabkit.operators.linear_map import LinearMap, Shapes, Way
from stabkit.tracing.products.site_plan import arithmetic, plan_sites
from stabkit.tracing.products.site_products import fill_by_sites
from stabkit.tracing.products.step_products import Products
from stabkit.tracing.products.unit_cotangents import UnitPuller, linear_nodes


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recorded segment as the origin of an operator.

    Attributes:
        products: the products of the segment's Jacobian.
        transposed: whether the operator is the transpose of that Jacobian.
    """

    products: Products
    transposed: bool = False

    @property
    def row_shapes(self) -> Shapes:
        """Shapes of one sample of the tensors that the rows run through."""
        return (self.products.source if self.transposed else self.products.target).axes

    @property
    def column_shapes(self) -> Shapes:
        """Shapes of one sample of the tensors that the columns run through."""
        return (self.products.target if self.transposed else self.products.source).axes

    def transpose(self) -> Recorded:
        """The same segment behind the transposed operator."""
        return Recorded(self.products, not self.transposed)

    def footprint(self) -> tuple[int, int]:
        """Bytes alive at once while one product is made, at most, and bytes of the widest tensor on the way."""
        return self.products.segment.footprint()

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that a product passes through."""
        return self.products.segment.dtypes()

    def ways(self, J: LinearMap, width: int) -> Iterator[Way]:
        """Ways to all rows that rest on the operations of the segment, the most promising first."""
        if self.transposed:
            return
        segment, source = self.products.segment, self.products.source
        plan = plan_sites(self.products)
        if plan is not None and arithmetic(plan, segment) <= WORTHWHILE:
            yield lambda out: fill_by_sites(plan, source, out, width)
        if linear_nodes(segment):
            yield lambda out: self._fill_from_weights(J, out, width)

    def _fill_from_weights(self, J: LinearMap, out: Tensor, width: int) -> str:
        source, target = self.products.source, self.products.target
        puller = UnitPuller(self.products.segment)
        how = fill_rows(J, lambda U: source.flatten(puller(target.unflatten(U))), out, width)
        return f"{how}, from the weights of {puller.n_read} layers" if puller.n_read else how


def jacobian_of(products: Products) -> Jacobian:
    """The Jacobian of a recorded segment, one block per sample."""
    source, target = products.source, products.target
    return Jacobian(
        (source.batch, target.size, source.size),
        products.forward,
        products.backward,
        dtype=torch.promote_types(source.dtype, target.dtype),
        device=source.device,
        path="recorded graph",
        origin=Recorded(products),
    )
