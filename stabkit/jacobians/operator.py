"""Batched linear operators: one block per sample, known by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse.linalg

Product = Callable[[Tensor], Tensor]


class Jacobian:
    """A batch of linear maps R^n -> R^m, one per sample, known by its products.

    Args:
        shape: ``(batch, m, n)``.
        matmat: ``(batch, n, k) -> (batch, m, k)``, the products J V.
        rmatmat: ``(batch, m, k) -> (batch, n, k)``, the products J^T U.
        dtype: the dtype of the products.
        device: where the products live.
        path: how the products are computed, in a few words; shown in results.

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
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.path = path
        self._matmat = matmat
        self._rmatmat = rmatmat

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
            ValueError: ``V`` has another shape.
        """
        return self._matmat(self._block(V, "V", self.shape[2]))

    def rmatmat(self, U: Tensor) -> Tensor:
        """J^T U for a block of vectors ``(batch, m, k)``; returns ``(batch, n, k)``."""
        return self._rmatmat(self._block(U, "U", self.shape[1]))

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
            (batch, n, m), self._rmatmat, self._matmat, dtype=self.dtype, device=self.device, path=self.path
        )

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Jacobian):
            return compose(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.matvec(other) if other.dim() == 2 else self.matmat(other)

    def dense(self, chunk: int = 128) -> Tensor:
        """The matrices themselves, ``(batch, m, n)``, built from ``min(m, n)`` products.

        Args:
            chunk: how many products are computed at once.
        """
        batch, m, n = self.shape
        out = torch.empty(batch, m, n, dtype=self.dtype, device=self.device)
        for start in range(0, min(m, n), chunk):
            stop = min(start + chunk, min(m, n))
            unit = torch.zeros(batch, min(m, n), stop - start, dtype=self.dtype, device=self.device)
            unit[:, torch.arange(start, stop), torch.arange(stop - start)] = 1
            if m <= n:
                out[:, start:stop, :] = self._rmatmat(unit).transpose(1, 2)
            else:
                out[:, :, start:stop] = self._matmat(unit)
        return out

    def to_scipy(self, sample: int = 0) -> scipy.sparse.linalg.LinearOperator:
        """One sample as a ``scipy.sparse.linalg.LinearOperator`` of shape ``(m, n)``.

        Raises:
            IndexError: there is no such sample.
        """
        import scipy.sparse.linalg

        batch, m, n = self.shape
        if not -batch <= sample < batch:
            raise IndexError(f"sample={sample}, but the Jacobian has {batch} samples (0 to {batch - 1})")

        def product(f: Product, size: int) -> Callable[[np.ndarray], np.ndarray]:
            def apply(v: np.ndarray) -> np.ndarray:
                block = torch.zeros(batch, size, v.size // size, dtype=self.dtype, device=self.device)
                block[sample] = torch.as_tensor(v.reshape(size, -1)).to(block)
                out: np.ndarray = f(block)[sample].detach().cpu().numpy()
                return out.reshape(-1) if v.ndim == 1 else out

            return apply

        forward, backward = product(self._matmat, n), product(self._rmatmat, m)
        return scipy.sparse.linalg.LinearOperator(
            (m, n),
            matvec=forward,
            rmatvec=backward,
            matmat=forward,
            rmatmat=backward,
            dtype=np.dtype(str(self.dtype).removeprefix("torch.")),
        )

    def _block(self, V: Tensor, name: str, size: int) -> Tensor:
        batch = self.shape[0]
        if V.dim() != 3 or V.shape[:2] != (batch, size):
            raise ValueError(
                f"{name} has shape {tuple(V.shape)}; expected (batch={batch}, {size}, k) "
                f"for a Jacobian of shape {self.shape}"
            )
        return V.to(dtype=self.dtype, device=self.device)


def from_dense(matrix: Tensor) -> Jacobian:
    """An operator over explicit matrices ``(batch, m, n)`` or ``(m, n)``.

    Raises:
        ValueError: ``matrix`` has neither two nor three dimensions.
        TypeError: its dtype is not floating point.
    """
    if matrix.dim() == 2:
        matrix = matrix.unsqueeze(0)
    if matrix.dim() != 3:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected (m, n) or (batch, m, n)")
    if not matrix.is_floating_point():
        raise TypeError(f"matrix has dtype {matrix.dtype}; expected a floating-point dtype: matrix.double()")
    batch, m, n = matrix.shape
    return Jacobian(
        (batch, m, n),
        lambda V: matrix @ V,
        lambda U: matrix.transpose(1, 2) @ U,
        dtype=matrix.dtype,
        device=matrix.device,
        path="dense",
    )


def compose(left: Jacobian, right: Jacobian) -> Jacobian:
    """The product of two operators, ``left`` after ``right``.

    Raises:
        ValueError: the inner sizes or the batches differ.
    """
    if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
        raise ValueError(f"shapes {left.shape} @ {right.shape} do not chain")
    return Jacobian(
        (left.shape[0], left.shape[1], right.shape[2]),
        lambda V: left.matmat(right.matmat(V)),
        lambda U: right.rmatmat(left.rmatmat(U)),
        dtype=left.dtype,
        device=left.device,
        path=f"{left.path} after {right.path}",
    )
