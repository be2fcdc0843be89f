"""Batched linear maps known by their products, one block per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stabkit.errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11

Product = Callable[[Tensor], Tensor]
Shapes = tuple[tuple[int, ...], ...]
Way = Callable[[Tensor], str]
"""Writes the rows of a map into zeros ``(batch, m, n)`` and says how."""


class Origin(Protocol):
    """What is known of a map beyond its products: what makes them, and cheaper ways to its matrix."""

    @property
    def transposed(self) -> bool:
        """Whether J V, and not J^T U, is the product that is made directly."""

    @property
    def row_shapes(self) -> Shapes:
        """Shapes of one sample of the tensors that the rows run through."""

    @property
    def column_shapes(self) -> Shapes:
        """Shapes of one sample of the tensors that the columns run through."""

    def transpose(self) -> Origin:
        """The origin of the transposed map."""

    def footprint(self) -> tuple[int, int]:
        """Bytes alive at once while one product is made, at most, and bytes of the widest tensor on the way."""

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that a product passes through."""

    def ways(self, J: LinearMap, width: int) -> Iterator[Way]:
        """Ways to all rows of J that may be cheaper than one product for each, ``width`` products at once."""


class LinearMap:
    """A batch of linear maps R^n -> R^m, one per sample, known by its products.

    Args:
        shape: ``(batch, m, n)``.
        matmat: ``(batch, n, k) -> (batch, m, k)``, the products J V.
        rmatmat: ``(batch, m, k) -> (batch, n, k)``, the products J^T U.
        dtype: the dtype of the products.
        device: where the products live.
        path: how the products are computed, in a few words; shown in results.
        row_shapes: shapes of one sample of the tensors that the m rows run through, one after the other; one vector
            by default. Structure is looked for along their axes.
        column_shapes: the same for the n columns.
        matrix: the entries, if they are known.
        explicit: whether the entries were given, and are exact, rather than computed.
        origin: what makes the products, where more is known of it; it then gives the row and column shapes.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        matmat: Product,
        rmatmat: Product,
        *,
        dtype: torch.dtype,
        device: torch.device,
        path: str = "",
        row_shapes: Shapes | None = None,
        column_shapes: Shapes | None = None,
        matrix: Tensor | None = None,
        explicit: bool = False,
        origin: Origin | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.path = path
        self.matrix = matrix
        self.explicit = explicit
        self.origin = origin
        self._matmat = matmat
        self._rmatmat = rmatmat
        if origin is not None:
            row_shapes, column_shapes = origin.row_shapes, origin.column_shapes
        self.row_shapes = row_shapes or ((shape[1],),)
        self.column_shapes = column_shapes or ((shape[2],),)

    def __repr__(self) -> str:
        batch, m, n = self.shape
        return f"{type(self).__name__}(batch={batch}, m={m}, n={n}, dtype={self.dtype}, path={self.path!r})"

    def matmat(self, V: Tensor) -> Tensor:
        """J V for a block of vectors.

        Args:
            V: ``(batch, n, k)``.

        Returns:
            ``(batch, m, k)``.

        Raises:
            ArgumentError: ``V`` has another shape.
        """
        V = self._block(V, "V", self.shape[2])
        return self._matmat(V) if V.shape[2] else V.new_zeros(self.shape[0], self.shape[1], 0)

    def rmatmat(self, U: Tensor) -> Tensor:
        """J^T U for a block of vectors ``(batch, m, k)``; returns ``(batch, n, k)``."""
        U = self._block(U, "U", self.shape[1])
        return self._rmatmat(U) if U.shape[2] else U.new_zeros(self.shape[0], self.shape[2], 0)

    def matvec(self, v: Tensor) -> Tensor:
        """J v for one vector per sample, ``(batch, n) -> (batch, m)``."""
        return self.matmat(v.unsqueeze(-1)).squeeze(-1)

    def rmatvec(self, u: Tensor) -> Tensor:
        """J^T u for one vector per sample, ``(batch, m) -> (batch, n)``."""
        return self.rmatmat(u.unsqueeze(-1)).squeeze(-1)

    @property
    def T(self) -> Self:
        """The transpose, per sample."""
        batch, m, n = self.shape
        return type(self)(
            (batch, n, m),
            self._rmatmat,
            self._matmat,
            dtype=self.dtype,
            device=self.device,
            path=self.path,
            row_shapes=self.column_shapes,
            column_shapes=self.row_shapes,
            matrix=None if self.matrix is None else self.matrix.transpose(1, 2),
            explicit=self.explicit,
            origin=None if self.origin is None else self.origin.transpose(),
        )

    def _block(self, V: Tensor, name: str, size: int) -> Tensor:
        batch = self.shape[0]
        if V.dim() != 3 or V.shape[:2] != (batch, size):
            raise ArgumentError(
                f"{name} has shape {tuple(V.shape)}; expected (batch={batch}, {size}, k) "
                f"for an operator of shape {self.shape}"
            )
        return V.to(dtype=self.dtype, device=self.device)
