"""Jacobians as linear maps that can be multiplied, composed, cut and written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import ArgumentError, ArgumentTypeError, OutOfRangeError
from stabkit.operators.dense import dense
from stabkit.operators.indices import Index, checked_index
from stabkit.operators.linear_map import LinearMap, Product
from stabkit.operators.sparse import sparse

if TYPE_CHECKING:
    import scipy.sparse
    import scipy.sparse.linalg


class Jacobian(LinearMap):
    """A batch of linear maps R^n -> R^m, one per sample, known by its products (see `LinearMap` for the arguments).

    Example:
        >>> import torch
        >>> J = from_dense(torch.tensor([[[2.0, 1.0], [0.0, 3.0]]]))
        >>> J.shape
        (1, 2, 2)
        >>> (J.T @ torch.ones(1, 2, 1)).flatten().tolist()
        [2.0, 4.0]
    """

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
            path=f"{self.path} minus identity",
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
            path=f"block of {self.path}",
            matrix=None if self.matrix is None else self.matrix[:, r][:, :, c],
            explicit=self.explicit,
        )

    @overload
    def dense(self, chunk: int | None = None, *, memory: int | None = None, structure: bool = True) -> Tensor: ...
    @overload
    def dense(
        self,
        chunk: int | None = None,
        *,
        memory: int | None = None,
        structure: bool = True,
        return_path: Literal[True],
    ) -> tuple[Tensor, str]: ...
    def dense(
        self, chunk: int | None = None, *, memory: int | None = None, structure: bool = True, return_path: bool = False
    ) -> Tensor | tuple[Tensor, str]:
        """The matrices themselves, ``(batch, m, n)``, from rows pulled back or columns pushed forward.

        Structure that makes this cheaper is looked for and used: rows that share no column are pulled back together,
        the weight of a last linear layer is read off rather than multiplied with, and what keeps tokens apart is
        differentiated for all tokens at once. The result must then agree with a random product, or it is built
        anew without structure; the path says which.

        Args:
            chunk: how many products are made at once; chosen to suit the caches, and ``memory``, by default.
            memory: bytes that the result and the work on it may take; by default four fifths of what is free.
            structure: False to make one product for every row or column.
            return_path: True for the matrices and, in words, how they were found.

        Raises:
            ArgumentError: the result does not fit in ``memory``, or ``chunk`` is not positive.

        Example:
            >>> import torch, stabkit
            >>> J = stabkit.trace(torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)).jacobian()
            >>> J.dense().shape
            torch.Size([1, 2, 2])
        """
        matrix, path = dense(self, chunk, memory, structure)
        return (matrix, path) if return_path else matrix

    @overload
    def sparse(self, *, memory: int | None = None) -> list[scipy.sparse.csr_array]: ...
    @overload
    def sparse(
        self, *, memory: int | None = None, return_path: Literal[True]
    ) -> tuple[list[scipy.sparse.csr_array], str]: ...
    def sparse(
        self, *, memory: int | None = None, return_path: bool = False
    ) -> list[scipy.sparse.csr_array] | tuple[list[scipy.sparse.csr_array], str]:
        """The exact matrices as ``scipy.sparse.csr_array``, one of shape ``(m, n)`` per sample, on the CPU.

        The pattern is found from a few random products along the axes of the state; rows that share no column are
        then pulled back together (Curtis, Powell and Reid 1974), so that a convolution takes as many products as
        its receptive field has entries, whatever the image size. Entries of the pattern that happen to be zero are
        kept. Where hardly any rows can go together, as in attention, the nonzero entries are taken from the dense
        matrix, if there is a cheaper way to that than row by row. The result agrees with a random product; if the
        first one does not, the rows are pulled back one by one, and the path says so.

        Args:
            memory: bytes that the result and the work on it may take; by default four fifths of what is free.
            return_path: True for the matrices and, in words, how they were found.

        Raises:
            ArgumentError: the result does not fit in ``memory``.

        Example:
            >>> import torch, stabkit
            >>> block = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False)
            >>> (J,) = stabkit.trace(block, torch.ones(1, 1, 100)).jacobian().sparse()
            >>> J.shape, J.nnz
            ((100, 100), 298)
        """
        matrices, path = sparse(self, memory)
        return (matrices, path) if return_path else matrices

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
        explicit=True,
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
