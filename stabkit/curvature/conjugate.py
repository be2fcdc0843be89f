"""The algebraically largest eigenvalue of an operator whose vectors are so large that few can be kept.

Conjugate gradients on the Rayleigh quotient (Y. T. Feng, D. R. J. Owen, Int. J. Numer. Methods Eng. 39 (1996) 2209)
keep four vectors, and find the value in about as many products as a Lanczos basis that is never restarted: a basis of
four rows has room for one product between restarts, and forgets at each what made the next one conjugate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import TraceError

_APART = 4  # products over which the value's rise is compared with the rise before
# What is left of the rise counts so often, and a gap is one from so many residuals on, and half of what it seems: it is
# that of the first rows. Of 30 searches (ten spectra, three dense up to the end, to 1e-2, 1e-3 and 1e-4) one is then
# further off than asked for, by 2.8 times, after 922 products in all; restarts of four rows: five, by up to 14 times,
# after 3626. With 1 for each of the three numbers 21 are, by up to 23 times, after 498.
_SAFE, _FAR = 4.0, 4.0

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Climb:
    """A vector on its way to the one with the largest eigenvalue.

    Attributes:
        vectors: ``(4, n)``: x of norm 1, the residual r = A x - value x, the last direction p, orthonormal to x, and
            A p; they are overwritten.
        value: the Rayleigh quotient of x.
        size: the largest value in size that was seen.
        second: what the next eigenvalue seems to be at most.
        past: value and norm of the residual after each product.
        asymmetry: the largest difference of x^T A p and p^T A x.
        converged: whether the error is at most what was asked for.
    """

    vectors: Tensor
    value: float
    size: float
    second: float
    past: list[tuple[float, float]]
    asymmetry: float = 0.0
    converged: bool = False

    @property
    def residual(self) -> float:
        """The norm of the residual, which bounds the distance to an eigenvalue."""
        return self.past[-1][1]

    def run(self, product: Product, tol: float, most: int) -> None:
        """Go on until the error, over the largest value in size, is ``tol``, or with so many products.

        Args:
            product: writes A v into its second argument, or returns it.
            tol: the error.
            most: products from here.
        """
        _, _, p, image = self.vectors
        for _ in range(most):
            self._turn()
            given = product(p, image)
            if given.data_ptr() != image.data_ptr():
                image.copy_(given)
            self._rise()
            self.converged = self._error() <= tol * self.size
            if self.converged:
                break

    def _turn(self) -> None:
        """The next direction: uphill, conjugate to the last one."""
        x, r, p, image = self.vectors
        below = _dot(p, image) - self.value  # never above 0: x is the best of the plane of x and p
        conjugate = -(_dot(r, image) - self.value * _dot(r, p)) / below if below < 0 else 0.0
        p.mul_(conjugate).add_(r)
        p.sub_(x, alpha=_dot(x, p))
        p.div_(torch.linalg.vector_norm(p))

    def _rise(self) -> None:
        """The best of the plane of x and the direction, of which the image is there."""
        x, r, p, image = self.vectors
        across, along = _dot(x, image), _dot(p, image)
        if not math.isfinite(across + along):
            raise not_finite()
        self.asymmetry = max(self.asymmetry, abs(across - _dot(p, r)))
        values, turns = np.linalg.eigh(np.array([[self.value, across], [across, along]]))
        a, c = (float(t) for t in turns[:, 1])
        new, old = float(values[1]), self.value
        r.mul_(a).add_(image, alpha=c).add_(p, alpha=-c * new).add_(x, alpha=a * (old - new))
        x.mul_(a).add_(p, alpha=c)
        x.div_(torch.linalg.vector_norm(x))
        slip = _dot(x, r)  # A x is not kept: what rounding has put along x is the value's
        r.sub_(x, alpha=slip)
        self.value = new + slip
        self.size = max(self.size, float(np.abs(values).max()))
        self.past.append((self.value, float(torch.linalg.vector_norm(r))))

    def _error(self) -> float:
        """What the value is off by: the residual, or what is left of a rise that slows down as a geometric series.

        The error goes with the square of the residual: what is left by that counts where it is more. Before there are
        rises to compare, it is the square over the gap to the next value, where that is far away.
        """
        if len(self.past) <= 2 * _APART:
            gap = self.value - self.second
            far = gap > _FAR * self.residual
            return min(self.residual, 2 * self.residual**2 / gap) if far else self.residual
        (first, _), (middle, then) = self.past[-1 - 2 * _APART], self.past[-1 - _APART]
        before, rise = middle - first, self.value - middle
        if not 0 <= rise < before:
            return self.residual
        left = rise * rise / (before - rise)
        return min(self.residual, _SAFE * max(left, (rise + left) * (self.residual / then) ** 2))


def not_finite() -> TraceError:
    """A product that is of no use."""
    return TraceError(
        "a product with the Hessian is not finite: a first or second derivative of the loss is NaN or beyond the range "
        "of its dtype where the weights are"
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))
