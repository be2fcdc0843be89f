"""Batched linear operators: one block per sample, known by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import ArgumentError, ArgumentTypeError, OutOfRangeError
from stabkit.jacobians.coordinates import Index, checked_index
from stabkit.jacobians.recorded import recorded

if TYPE_CHECKING:
    import scipy.sparse
    import scipy.sparse.linalg

Product = Callable[[Tensor], Tensor]
Shapes = tuple[tuple[int, ...], ...]


class Jacobian:
    """A batch of linear maps R^n -> R^m, one per sample, known by its products.

    Args:
        shape: ``(batch, m, n)``.
        matmat: ``(batch, n, k) -> (batch, m, k)``, the products J V.
        rmatmat: ``(batch, m, k) -> (batch, n, k)``, the products J^T U.
        dtype: the dtype of the products.
        device: where the products live.
        path: how the products are computed, in a few words; shown in results. ``dense()`` and ``sparse()`` add how
            they found the entries.
        row_shapes: shapes of one sample of the tensors that the m rows run through, one after the other; one vector
            by default. Structure is looked for along their axes.
        column_shapes: the same for the n columns.
        matrix: the entries, if they are known.

    Attributes:
        recorded: the recorded part of a forward pass whose products these are; None for other operators. Its states
            give the row and column shapes.

    Example:
        >>> import torch
        >>> J = from_dense(torch.tensor([[[2.0, 1.0], [0.0, 3.0]]]))
        >>> J.shape
        (1, 2, 2)
        >>> (J.T @ torch.ones(1, 2, 1)).flatten().tolist()
        [2.0, 4.0]
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
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.path = path
        self.matrix = matrix
        self.recorded = recorded(matmat)
        self._products_path = path
        self._matmat = matmat
        self._rmatmat = rmatmat
        if self.recorded is not None:
            row_shapes, column_shapes = self.recorded.rows.axes, self.recorded.columns.axes
        self.row_shapes = row_shapes or ((shape[1],),)
        self.column_shapes = column_shapes or ((shape[2],),)

    def __repr__(self) -> str:
        batch, m, n = self.shape
        return f"Jacobian(batch={batch}, m={m}, n={n}, dtype={self.dtype}, path={self.path!r})"

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
    def T(self) -> Jacobian:
        """The transpose, per sample."""
        batch, m, n = self.shape
        return Jacobian(
            (batch, n, m),
            self._rmatmat,
            self._matmat,
            dtype=self.dtype,
            device=self.device,
            path=self._products_path,
            row_shapes=self.column_shapes,
            column_shapes=self.row_shapes,
            matrix=None if self.matrix is None else self.matrix.transpose(1, 2),
        )

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Jacobian):
            return compose(self, other)
        if not isinstance(other, Tensor):
            raise ArgumentTypeError(
                f"J @ {type(other).__name__}: expected a torch tensor (batch, n, k) or another Jacobian; for numpy "
                "arrays there are torch.from_numpy(V) and J.to_scipy(sample)"
            )
        return self.matvec(other) if other.dim() == 2 else self.matmat(other)

    def minus_identity(self) -> Jacobian:
        """J - I: of a residual step ``x + f(x)`` the Jacobian of its branch f.

        Raises:
            ArgumentError: J is not square.

        Example:
            >>> import torch
            >>> from_dense(torch.tensor([[3.0, 1.0], [0.0, 1.0]])).minus_identity().dense()[0].tolist()
            [[2.0, 1.0], [0.0, 0.0]]
        """
        _, m, n = self.shape
        if m != n:
            raise ArgumentError(
                f"minus_identity() needs a square Jacobian; this one is {m} x {n}: the step changes space"
            )
        eye = None if self.matrix is None else torch.eye(n, dtype=self.dtype, device=self.device)
        return Jacobian(
            self.shape,
            lambda V: self.matmat(V) - V,
            lambda U: self.rmatmat(U) - U,
            dtype=self.dtype,
            device=self.device,
            path=f"{self._products_path} minus identity",
            row_shapes=self.row_shapes,
            column_shapes=self.column_shapes,
            matrix=None if self.matrix is None or eye is None else self.matrix - eye,
        )

    def restrict(self, rows: Index | None = None, columns: Index | None = None) -> Jacobian:
        """The block of J at some rows and columns, say of one token or of some channels (see `coordinates`).

        Args:
            rows: which coordinates of the target are looked at, in this order; all by default.
            columns: which coordinates of the source may move; all by default.

        Raises:
            OutOfRangeError: a coordinate does not exist.
            ArgumentError: no coordinate is named, or one twice.

        Example:
            >>> import torch
            >>> from_dense(torch.arange(6.0).view(2, 3)).restrict(rows=[1], columns=[2, 0]).dense()[0].tolist()
            [[5.0, 3.0]]
        """
        batch, m, n = self.shape
        r = checked_index(rows, m, "rows", self.device)
        c = checked_index(columns, n, "columns", self.device)

        def spread(block: Tensor, index: Tensor, size: int) -> Tensor:
            rows_first = block.new_zeros(block.shape[2], batch, size)
            rows_first[:, :, index] = block.permute(2, 0, 1)
            return rows_first.permute(1, 2, 0)

        return Jacobian(
            (batch, len(r), len(c)),
            lambda V: self.matmat(spread(V, c, n))[:, r],
            lambda U: self.rmatmat(spread(U, r, m))[:, c],
            dtype=self.dtype,
            device=self.device,
            path=f"block of {self._products_path}",
            matrix=None if self.matrix is None else self.matrix[:, r][:, :, c],
        )

    def dense(self, chunk: int | None = None, *, memory: int | None = None, structure: bool = True) -> Tensor:
        """The matrices themselves, ``(batch, m, n)``, from rows pulled back or columns pushed forward.

        Structure that makes this cheaper is looked for and used: rows that share no column are pulled back together,
        the weight of a last linear layer is read off rather than multiplied with, and what keeps tokens apart is
        differentiated for all tokens at once. The result must then agree with a random product, or it is built
        anew without structure; ``path`` says which.

        Args:
            chunk: how many products are made at once; chosen to suit the caches, and ``memory``, by default.
            memory: bytes that the result and the work on it may take; by default four fifths of what is free.
            structure: False to make one product for every row or column.

        Raises:
            ArgumentError: the result does not fit in ``memory``, or ``chunk`` is not positive.

        Example:
            >>> import torch, stabkit
            >>> J = stabkit.trace(torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)).jacobian()
            >>> J.dense().shape
            torch.Size([1, 2, 2])
        """
        from stabkit.jacobians.dense import dense

        matrix, how = dense(self, chunk, memory, structure)
        self.path = f"{self._products_path}; {how}" if how else self._products_path
        return matrix

    def sparse(self, *, memory: int | None = None) -> list[scipy.sparse.csr_array]:
        """The exact matrices as ``scipy.sparse.csr_array``, one of shape ``(m, n)`` per sample, on the CPU.

        The pattern is found from a few random products along the axes of the state; rows that share no column are
        then pulled back together (Curtis, Powell and Reid 1974), so that a convolution takes as many products as
        its receptive field has entries, whatever the image size. Entries of the pattern that happen to be zero are
        kept. Where hardly any rows can go together, as in attention, the nonzero entries are taken from the dense
        matrix, if there is a cheaper way to that than row by row. The result agrees with a random product; if the
        first one does not, the rows are pulled back one by one, and ``path`` says so.

        Args:
            memory: bytes that the result and the work on it may take; by default four fifths of what is free.

        Raises:
            ArgumentError: the result does not fit in ``memory``.

        Example:
            >>> import torch, stabkit
            >>> block = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False)
            >>> (J,) = stabkit.trace(block, torch.ones(1, 1, 100)).jacobian().sparse()
            >>> J.shape, J.nnz
            ((100, 100), 298)
        """
        from stabkit.jacobians.sparse import sparse

        matrices, how = sparse(self, memory)
        self.path = f"{self._products_path}; {how}" if how else self._products_path
        return matrices

    def to_scipy(self, sample: int = 0) -> scipy.sparse.linalg.LinearOperator:
        """One sample as a ``scipy.sparse.linalg.LinearOperator`` of shape ``(m, n)``.

        It works in float64 or, for products in any coarser dtype, in float32: scipy's solvers take no others.

        Raises:
            OutOfRangeError: there is no such sample.
        """
        import scipy.sparse.linalg

        batch, m, n = self.shape
        precision = torch.float64 if self.dtype == torch.float64 else torch.float32
        if not -batch <= sample < batch:
            raise OutOfRangeError(f"sample={sample}, but the Jacobian has {batch} samples (0 to {batch - 1})")

        def product(f: Product, size: int) -> Callable[[np.ndarray], np.ndarray]:
            def apply(v: np.ndarray) -> np.ndarray:
                block = torch.zeros(batch, size, v.size // size, dtype=self.dtype, device=self.device)
                block[sample] = torch.as_tensor(v.reshape(size, -1)).to(block)
                out: np.ndarray = f(block)[sample].detach().cpu().to(precision).numpy()
                return out.reshape(-1) if v.ndim == 1 else out

            return apply

        forward, backward = product(self._matmat, n), product(self._rmatmat, m)
        return scipy.sparse.linalg.LinearOperator(
            (m, n),
            matvec=forward,
            rmatvec=backward,
            matmat=forward,
            rmatmat=backward,
            dtype=np.dtype(str(precision).removeprefix("torch.")),
        )

    def _block(self, V: Tensor, name: str, size: int) -> Tensor:
        batch = self.shape[0]
        if V.dim() != 3 or V.shape[:2] != (batch, size):
            raise ArgumentError(
                f"{name} has shape {tuple(V.shape)}; expected (batch={batch}, {size}, k) "
                f"for a Jacobian of shape {self.shape}"
            )
        return V.to(dtype=self.dtype, device=self.device)


def from_dense(matrix: Tensor) -> Jacobian:
    """An operator over explicit matrices ``(batch, m, n)`` or ``(m, n)``.

    Raises:
        ArgumentError: ``matrix`` has neither two nor three dimensions.
        ArgumentTypeError: its dtype is not floating point.
    """
    if matrix.dim() == 2:
        matrix = matrix.unsqueeze(0)
    if matrix.dim() != 3:
        raise ArgumentError(f"matrix has shape {tuple(matrix.shape)}; expected (m, n) or (batch, m, n)")
    if not matrix.is_floating_point():
        raise ArgumentTypeError(f"matrix has dtype {matrix.dtype}; expected a floating-point dtype: matrix.double()")
    batch, m, n = matrix.shape
    return Jacobian(
        (batch, m, n),
        lambda V: matrix @ V,
        lambda U: matrix.transpose(1, 2) @ U,
        dtype=matrix.dtype,
        device=matrix.device,
        path="dense",
        matrix=matrix,
    )


def compose(left: Jacobian, right: Jacobian) -> Jacobian:
    """The product of two operators, ``left`` after ``right``.

    Raises:
        ArgumentError: the inner sizes or the batches differ.
    """
    if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
        raise ArgumentError(f"shapes {left.shape} @ {right.shape} do not chain")
    return Jacobian(
        (left.shape[0], left.shape[1], right.shape[2]),
        lambda V: left.matmat(right.matmat(V)),
        lambda U: right.rmatmat(left.rmatmat(U)),
        dtype=left.dtype,
        device=left.device,
        path=f"{left.path} after {right.path}",
        row_shapes=left.row_shapes,
        column_shapes=right.column_shapes,
    )
