"""Matrices and eigenvalues of several operators, each computed once for all who ask."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stabkit.jacobians.spectra import eigenvalues
from stabkit.jacobians.spectrum import Spectrum
from stabkit.operators.jacobian import Jacobian

_KEPT_BYTES = 2**29  # of matrices; the oldest are forgotten, and made again if they are wanted again


class SharedSpectra:
    """Dense matrices and all eigenvalues of numbered operators, of their first samples.

    Args:
        operator: the Jacobian of a number.
        samples: how many samples of each are kept, from the first.

    Example:
        >>> import torch
        >>> from stabkit.operators import from_dense
        >>> shared = SharedSpectra(lambda index: from_dense(torch.eye(2).expand(3, 2, 2) * index), samples=1)
        >>> shared.matrix(5).tolist(), shared.eigenvalues(5, 0).values.real.tolist()
        ([[[5.0, 0.0], [0.0, 5.0]]], [[5.0, 5.0]])
    """

    def __init__(self, operator: Callable[[int], Jacobian], samples: int) -> None:
        self.samples = samples
        self._operator = operator
        self._matrices: dict[int, Tensor] = {}
        self._eigenvalues: dict[tuple[int, int], Spectrum] = {}

    def matrix(self, index: int) -> Tensor:
        """The matrices ``(samples, m, n)`` of an operator, in its own dtype and on its own device."""
        if index not in self._matrices:
            self._matrices[index] = self._operator(index).dense()[: self.samples].detach().clone()
            self._forget(index)
        return self._matrices[index]

    def eigenvalues(self, index: int, sample: int) -> Spectrum:
        """All eigenvalues of one sample of a square operator; the same as those of the matrix alone.

        Raises:
            ArgumentError: the matrix is not finite.
        """
        key = (index, sample)
        if key not in self._eigenvalues:
            self._eigenvalues[key] = eigenvalues(self.matrix(index)[sample : sample + 1], method="dense")
        return self._eigenvalues[key]

    def _forget(self, newest: int) -> None:
        kept = sum(matrix.numel() * matrix.element_size() for matrix in self._matrices.values())
        for index in list(self._matrices):
            if kept <= _KEPT_BYTES or index == newest:
                return
            matrix = self._matrices.pop(index)
            kept -= matrix.numel() * matrix.element_size()
