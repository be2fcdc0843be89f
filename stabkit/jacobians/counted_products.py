"""What every spectral method needs of an operator: checked input, and counted products in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.operators.jacobian import Jacobian, from_dense
from stabkit.tracing.graph.values import entries_are_finite


class BudgetSpentError(Exception):
    """The next product would exceed ``max_products``; caught by the methods, never seen by a user."""


def as_jacobian(J: Jacobian | Tensor | np.ndarray) -> Jacobian:
    """The operator itself, or one over the explicit matrices ``(m, n)`` or ``(batch, m, n)``.

    Raises:
        ArgumentTypeError: neither an operator nor a matrix, or entries that are not real floating-point numbers.
        ArgumentError: wrong number of dimensions, no entries, or entries that are not finite.
    """
    if isinstance(J, np.ndarray):
        J = _tensor(J)
    if isinstance(J, Tensor):
        if J.is_complex():
            raise ArgumentTypeError(f"J has dtype {J.dtype}; expected real entries (a Jacobian is real)")
        if not J.is_floating_point():
            raise ArgumentTypeError(f"J has dtype {J.dtype}; expected a floating-point dtype: J.double()")
        if J.dim() not in (2, 3):
            raise ArgumentError(f"J has shape {tuple(J.shape)}; expected (m, n) or (batch, m, n)")
        J = J.detach()
        J = from_dense((J.cpu() if J.device.type == "mps" else J).double())  # exact; mps has no float64
    if not isinstance(J, Jacobian):
        raise ArgumentTypeError(f"J is a {type(J).__name__}; expected a Jacobian, a torch tensor or a numpy array")
    if 0 in J.shape:
        raise ArgumentError(f"J has shape {tuple(J.shape)}; expected at least one sample, row and column")
    return J


def _tensor(matrix: np.ndarray) -> Tensor:
    if matrix.dtype.kind not in "fiubc":
        raise ArgumentTypeError(f"J has dtype {matrix.dtype}; expected a floating-point dtype")
    return torch.from_numpy(np.ascontiguousarray(matrix))


def dense_float64(J: Jacobian) -> tuple[Tensor, str]:
    """The matrices ``(batch, m, n)`` in float64 on the CPU, and how they were found.

    Raises:
        ArgumentError: an entry is nan or infinite.
    """
    entries, path = J.dense(return_path=True)
    dense = entries.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(dense).all():
        sample = int((~torch.isfinite(dense)).flatten(1).any(1).nonzero()[0])
        raise ArgumentError(
            f"J has nan or infinite entries (first in sample {sample}); its spectrum is not defined: "
            "check the inputs and the parameters with torch.isfinite"
        )
    return dense, path


def rounding(J: Jacobian) -> float:
    """Relative rounding error of one product."""
    return float(torch.finfo(J.dtype).eps)


def default_tolerance(J: Jacobian) -> float:
    """The residual, as a fraction of the norm of J, that counts as converged when the caller names none."""
    return max(1e-10, 16 * rounding(J))


def entry_rounding(J: Jacobian) -> float:
    """Relative error of the entries of ``J.dense()``: of the products that made them, none in explicit matrices."""
    return float(torch.finfo(torch.float64).eps) if J.explicit else rounding(J)


_FAR = 200  # powers of two beyond which squares of squares come near the ends of the range of a float64


def powers_of_two(numbers: Tensor) -> Tensor:
    """For every sample of ``(batch, ...)`` the size of its numbers, where that is so far from 1 that squares get lost.

    1 elsewhere. Dividing by a power of two is exact.
    """
    powers = numbers.abs().flatten(1).amax(1).log2()
    far = powers.isfinite() & (powers.abs() > _FAR)
    return torch.where(far, powers.round().clamp_max(1000), torch.zeros_like(powers)).exp2()


class CountedProducts:
    """Products with an operator, made in its dtype, returned in float64, counted against a budget.

    Vectors are rows here, ``(batch, k, n)``: a basis that grows is then contiguous for each sample.

    Args:
        J: the operator.
        max_products: the budget, in vectors per sample.
        units: what products are divided by, ``(batch,)``; ``"own"`` for what the first product shows to be needed for
            squares to stay in the range of a float, None for nothing.
    """

    def __init__(self, J: Jacobian, max_products: int | None, units: Tensor | str | None = None) -> None:
        self.J = J
        self.max_products = max_products
        self._units = units
        self.count = 0
        self.device = torch.device("cpu") if J.device.type == "mps" else J.device  # mps has no float64

    def remaining(self) -> float:
        """How many vectors may still be multiplied."""
        return float("inf") if self.max_products is None else self.max_products - self.count

    def forward(self, V: Tensor) -> Tensor:
        """J V for rows ``(batch, k, n)``; returns ``(batch, k, m)``."""
        return self._apply(self.J, V)

    def adjoint(self, U: Tensor) -> Tensor:
        """J^T U for rows ``(batch, k, m)``; returns ``(batch, k, n)``."""
        return self._apply(self.J.T, U)

    def unit(self, sample: int) -> float:
        """What the products of a sample were divided by."""
        return float(self._units[sample]) if isinstance(self._units, Tensor) else 1.0

    def transposed(self) -> CountedProducts:
        """The same count and budget on the transposed operator, starting from what is left."""
        left = None if self.max_products is None else self.max_products - self.count
        return CountedProducts(self.J.T, left, self._units)

    def _apply(self, J: Jacobian, rows: Tensor) -> Tensor:
        if rows.shape[1] > self.remaining():
            raise BudgetSpentError
        if not rows.shape[1]:
            return rows.new_zeros(J.shape[0], 0, J.shape[1])
        product = J.matmat(rows.transpose(1, 2)).detach()
        self.count += rows.shape[1]
        out = product.to(device=self.device, dtype=torch.float64).transpose(1, 2).contiguous()
        if not entries_are_finite(out):
            raise ArgumentError(
                "a product with J has nan or infinite entries: check the inputs and the parameters with "
                f"torch.isfinite, or use a wider dtype than {J.dtype}"
            )
        if isinstance(self._units, str):
            units = powers_of_two(out)
            self._units = None if bool((units == 1).all()) else units
        return out if self._units is None else out / self._units.reshape(-1, 1, 1)
