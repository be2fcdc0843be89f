"""The recorded part of a forward pass behind an operator, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stabkit.tracing.products import Products, Space


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recorded segment as the origin of an operator.

    Attributes:
        products: its products.
        transposed: whether the operator is the transpose of its Jacobian.
    """

    products: Products
    transposed: bool

    @property
    def rows(self) -> Space:
        """The state that the rows of the operator run through."""
        return self.products.source if self.transposed else self.products.target

    @property
    def columns(self) -> Space:
        """The state that the columns of the operator run through."""
        return self.products.target if self.transposed else self.products.source


def recorded(matmat: Callable[[Tensor], Tensor]) -> Recorded | None:
    """What stands behind the products of an operator: a bound method knows whose products it makes."""
    owner = getattr(matmat, "__self__", None)
    if not isinstance(owner, Products):
        return None
    return Recorded(owner, matmat == owner.backward)
