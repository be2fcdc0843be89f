"""A copy of an optimizer that moves copies of the parameters, so that real updates can be made and looked at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.curvature.hessian import Hessian
from stabkit.curvature.updates import copied
from stabkit.errors import ArgumentError, TraceError
from stabkit.tracing.recording.sharding import own_part

# Of differences of gradients, in float32 and in float64: length over the norm of the weights, how well two lengths must
# agree, and by how much the products must differ from both. Kinks of ReLUs are in the differences and not in products.
_LENGTHS, _AGREE, _DIFFER = (1e-2, 1e-6), (0.05, 0.005), (0.1, 0.02)


@contextlib.contextmanager
def standing_at(parameters: Sequence[nn.Parameter], points: Sequence[Tensor]) -> Iterator[None]:
    """The parameters hold other values meanwhile, and are bit for bit the same afterwards.

    Nothing is written to what a plain parameter held, so that graphs that saved it stay whole. One that is spread over
    ranks, of which graphs hold whole copies, is written to.
    """
    plain = [type(p) in (Tensor, nn.Parameter) for p in parameters]
    kept = [p.data if own else p.detach().clone() for p, own in zip(parameters, plain, strict=True)]
    try:
        _place(parameters, points, plain)
        yield
    finally:
        _place(parameters, kept, plain)


def _place(parameters: Sequence[nn.Parameter], values: Sequence[Tensor], plain: Sequence[bool]) -> None:
    with torch.no_grad():
        for p, value, own in zip(parameters, values, plain, strict=True):
            if own:
                p.data = value
            else:
                p.copy_(value)


class Twin:
    """An optimizer with its settings and its state, for copies of the parameters.

    Args:
        hessian: of the loss, at the parameters that are copied.
        optimizer: of these parameters; it stays as it is.
        factor: what its rates are multiplied with.
        change: of the settings of every group; None leaves them as they are.
        longest: the norm that gradients are clipped to.

    Raises:
        ArgumentError: no copy of the optimizer can be made.
    """

    def __init__(
        self,
        hessian: Hessian,
        optimizer: torch.optim.Optimizer,
        factor: float = 1.0,
        change: Callable[[dict[str, Any]], object] | None = None,
        *,
        longest: float = math.inf,
    ) -> None:
        self._hessian, self._name, self._longest = hessian, type(optimizer).__name__, longest
        self._copies = [nn.Parameter(p.detach().clone()) for p in hessian.parameters]
        memo: dict[int, Any] = {id(p): c for p, c in zip(hessian.parameters, self._copies, strict=True)}
        try:
            self._optimizer = copied(optimizer, memo)
        except Exception as error:  # whatever a class of one's own raises
            raise ArgumentError(f"no copy can be made of optimizer {self._name}: {error}") from error
        self._takes_rows = isinstance(optimizer, torch.optim.SparseAdam)
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr"] * factor
            if change is not None:
                change(group)

    def values(self) -> list[Tensor]:
        """Where the copies are."""
        return [c.detach() for c in self._copies]

    def step(self) -> float:
        """Make one update with the gradient where the copies are; the loss before it.

        Raises:
            ArgumentError: the optimizer makes no update by itself.
        """
        with standing_at(self._hessian.parameters, self.values()):
            value, slopes = self._hessian.slopes()
        for c, slope in zip(self._copies, slopes, strict=True):
            part = None if slope is None else own_part(slope, c)
            c.grad = part.to_sparse(1) if part is not None and self._takes_rows else part
        if self._longest < math.inf and not self._takes_rows:
            nn.utils.clip_grad_norm_(self._copies, self._longest)
        try:
            self._optimizer.step()
        except Exception as error:  # one that needs a closure raises TypeError, one of one's own anything
            raise ArgumentError(
                f"optimizer {self._name} makes no update of copies of the parameters by itself: "
                f"{type(error).__name__}: {error}"
            ) from error
        return value

    def losses(self, steps: int) -> list[float]:
        """The loss before each of some updates, and after the last; it ends where it is not finite."""
        found: list[float] = []
        for _ in range(steps):
            found.append(self.step())
            if not math.isfinite(found[-1]):
                return found
        with standing_at(self._hessian.parameters, self.values()):
            return [*found, self._hessian.loss()]


def refuse_wrong_products(hessian: Hessian, v: Tensor) -> None:
    """Where a backward was written by hand, v^T H v must be what differences of gradients along v give.

    A backward that detaches what it saved, or computes in numpy, gives a right gradient and leaves out a part of H
    without an error, and the rest may well be symmetric.

    Raises:
        TraceError: it is not.
    """
    if not hessian.sum_of(bool(hessian.by_hand)):  # a rank without a batch has seen none
        return
    product = float(v.double() @ hessian.matvec(v).double())
    hessian.release()
    size = sum(float(torch.linalg.vector_norm(p.detach().double())) ** 2 for p in hessian.parameters) ** 0.5
    fine = hessian.dtype == torch.float64 and all(p.dtype == torch.float64 for p in hessian.parameters)
    length = _LENGTHS[fine] * (size or 1.0)
    far, near = (_difference(hessian, v, length), _difference(hessian, v, length / 4))
    scale = max(abs(near), abs(product))
    # two lengths that agree say that neither rounding nor what is beyond the second order is in them
    if abs(far - near) <= _AGREE[fine] * scale and abs(near - product) > _DIFFER[fine] * scale:
        name = hessian.by_hand or "a custom autograd.Function"
        raise TraceError(
            f"the curvature along the eigenvector is {product:.4g} by products with the Hessian and {near:.4g} by "
            f"differences of gradients: the backward of {name} is not differentiable as it is written. "
            "Write it with operations on saved tensors, without detach, numpy or no_grad"
        )


def _difference(hessian: Hessian, v: Tensor, length: float) -> float:
    slopes = []
    for sign in (1.0, -1.0):
        points = [
            torch.add(p.detach(), part, alpha=sign * length)
            for p, part in zip(hessian.parameters, hessian.split(v), strict=True)
        ]
        with standing_at(hessian.parameters, points):
            _, parts = hessian.slopes()
        total = torch.zeros_like(v, dtype=torch.float64)
        hessian.add(total, parts, 1.0)
        slopes.append(float(v.double() @ total))
    return (slopes[0] - slopes[1]) / (2 * length)
