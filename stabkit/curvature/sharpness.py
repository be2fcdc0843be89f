"""Sharpness: the largest curvature of a loss, and whether the learning rate is stable on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.curvature.batches import Batches
from stabkit.curvature.blocks import BlockCurvature, by_block
from stabkit.curvature.gauss_newton import gauss_newton
from stabkit.curvature.hessian import Gradient, Hessian, refuse_randomness
from stabkit.curvature.lanczos import DRAWN, Eigenpairs, largest, rows_for
from stabkit.curvature.stability import Preconditioned, Stability, limiting
from stabkit.curvature.summing import ALONE, Summing, agreed
from stabkit.curvature.twin import refuse_wrong_products
from stabkit.curvature.updates import Update, plain_update, read_update
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.integrators import GeneralLinearMethod
from stabkit.results import Result
from stabkit.statistics import student_factor
from stabkit.tracing.recording.randomness import unchanged_randomness
from stabkit.tracing.recording.wrappers import unwrap

_TOLERANCE = 1e-3
_ASYMMETRIC = 1e-2  # of the largest entry; rounding in float32 stays below 1e-4, a wrong derivative is of order one
_MOST = 400  # products of one search


@dataclass(frozen=True, eq=False)
class Sharpness(Result):
    """The largest eigenvalues of the Hessian of a loss, beside what the optimizer's next update can bear.

    Attributes:
        values: ``(k,)`` float64, the algebraically largest eigenvalues of the Hessian H, in units of the loss per
            squared parameter.
        residuals: ``(k,)``, norms of H v - value v; each bounds the distance to an eigenvalue.
        converged: ``(k,)``, whether the error is at most ``tol`` times the largest value in size: the residual, or its
            square over the gap to the next value where that is less.
        lowest: the smallest Ritz value, an upper bound of the smallest eigenvalue.
        lowest_residual: its residual.
        gauss_newton: ``(k,)``, the part of each value that comes from the curvature of the loss in the output; the
            rest is curvature of the network.
        interval: where the mean over batches of v^T H v lies, at 95 percent by Student's t over the batches, v the
            first eigenvector; None for fewer than 3 batches.
        n_products: products with the Hessian, each through all batches.
        loss: the value of the loss.
        method: the optimizer's update as a method for the gradient flow; None without an optimizer.
        learning_rate: the present rate, of the group with the largest one.
        preconditioned: ``(k,)``, the largest eigenvalues of P^-1 (H + W), P the optimizer's preconditioner and W its
            coupled weight decay; equal to ``values`` where P is the identity.
        preconditioned_residuals: ``(k,)``, theirs.
        threshold: the largest curvature at which updates stay bounded: the real stability interval of the method over
            the rate, less the weight decay where it stands in no W.
        ratio: ``preconditioned[0] / threshold``; above 1 the next updates grow along the first eigenvector, on a
            quadratic of this curvature.
        largest_stable_lr: the rate at which the ratio is 1; ``inf`` where nothing curves upwards.
        by_block: what part of the first eigenvector that limits the rate lies in each block, the largest first, and
            the own sharpness of the first few.
        notes: what a reader should know about how it was computed.
        vector: ``(n,)``, the first eigenvector of H in the order of the parameters, where a later search may begin.
    """

    values: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    lowest: float
    lowest_residual: float
    gauss_newton: np.ndarray
    interval: tuple[float, float] | None
    n_products: int
    loss: float
    method: GeneralLinearMethod | None
    learning_rate: float | None
    preconditioned: np.ndarray
    preconditioned_residuals: np.ndarray
    threshold: float | None
    ratio: float | None
    largest_stable_lr: float | None
    by_block: tuple[BlockCurvature, ...]
    notes: tuple[str, ...] = ()
    vector: Tensor | None = field(default=None, repr=False)

    def _contents(self) -> dict[str, Any]:
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vector"}
        return named | {"method": None if self.method is None else self.method.name}

    def __str__(self) -> str:
        shown = ", ".join(f"{v:.4g} (residual {r:.1g})" for v, r in zip(self.values, self.residuals, strict=True))
        lines = [f"sharpness {shown}; {self.n_products} products with the Hessian"]
        if self.ratio is not None and self.threshold is not None:
            kind = "preconditioned curvature" if self.preconditioned[0] != self.values[0] else "curvature"
            lines.append(
                f"{kind} {self.preconditioned[0]:.4g} against {self.threshold:.4g}, the most that a rate of "
                f"{self.learning_rate:.4g} bears: ratio {self.ratio:.3g}; stable up to a rate of "
                f"{self.largest_stable_lr:.4g}"
            )
        lines += [f"  {block}" for block in self.by_block[:5]]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@accepts
def sharpness(
    model: nn.Module,
    *inputs: Any,
    loss: Any,
    optimizer: Any = None,
    k: int = 1,
    tol: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    start: Tensor | None = None,
    blocks: Sequence[str] | None = None,
    own: int = 3,
    ranks: Summing | None = None,
) -> Sharpness:
    """The largest curvature of a loss in the parameters, and whether an optimizer's learning rate is stable on it.

    An update of gradient descent is a step of forward Euler of the gradient flow: along an eigenvector of the Hessian
    with eigenvalue c it multiplies by 1 - lr c, which grows beyond c = 2 / lr. Momentum and Adam are other methods with
    other intervals (`stabkit.integrators.heavy_ball`, `nesterov`, `adam`). Eigenvalues come from Lanczos with products
    through the kept graph of one gradient; the matrix is never made.

    Args:
        model: the model, in the mode as it is; it comes back as it was.
        *inputs: what it is called with.
        loss: a callable on the output that returns a scalar; with ``batches``, on the output and the targets.
        optimizer: SGD, Adam, AdamW, NAdam, Adamax, RMSprop or Adagrad of the model's parameters, with its state; None
            for the curvature of the loss alone, in all parameters that require grad.
        k: how many eigenvalues.
        tol: the error, over the largest value in size, that counts as converged; 1e-3 by default.
        kwargs: keyword arguments of the call.
        seed: of what the model draws, and of the start of the search.
        batches: pairs of inputs and targets in place of ``inputs``, over which the loss is the mean, each batch by its
            number of samples; a list, or a loader that gives the same batches in the same order each time.
        start: where the search begins, such as ``vector`` of an earlier result of the same model.
        blocks: paths of modules that the parameters are shared out to; by default those that hold them, as for what
            lies in none of the paths.
        own: of how many blocks, those with the largest shares, the own sharpness is computed too.
        ranks: who shares the batches, such as ``stabkit.distributed.current()``; every rank must then make this call
            with the same model and batches, and gets the same result. None: this process goes through all.

    Raises:
        ArgumentError: the loss is random, the optimizer is not the model's or has no threshold, or no parameter is
            trained.
        TraceError: the loss is no scalar, or cannot be differentiated twice.

    Example:
        >>> import torch
        >>> model, x = torch.nn.Linear(2, 1, bias=False).double(), torch.diag(torch.tensor([3.0, 1.0])).double()
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.2)
        >>> found = sharpness(model, x, loss=lambda out: out.square().sum() / 2, optimizer=sgd)
        >>> round(float(found.values[0]), 6), round(found.threshold, 6), round(found.ratio, 6)
        (9.0, 10.0, 0.9)
    """
    shared = ranks or ALONE
    with agreed(shared):
        _check(model, k, tol, start, blocks)
        tol = _TOLERANCE if tol is None else float(tol)
        module = unwrap(model)
        update = None if optimizer is None else read_update(optimizer, module)
        parameters = plain_update(module.parameters()) if update is None else update.parameters
        if not parameters:
            raise ArgumentError("no parameter of the model requires grad; there is no curvature to measure")
    with torch.inference_mode(False), unchanged_randomness():
        with agreed(shared):
            hessian = Hessian(module, parameters, Batches(inputs, kwargs, loss, batches), seed, shared)
        with hessian.casting.off():
            refuse_randomness(hessian, keep=True)
            return of_hessian(hessian, update, k=k, tol=tol, start=start, blocks=blocks, own=own)


def of_hessian(
    hessian: Hessian,
    update: Update | None = None,
    *,
    k: int = 1,
    tol: float = _TOLERANCE,
    start: Tensor | None = None,
    blocks: Sequence[str] | None = None,
    own: int = 3,
) -> Sharpness:
    """`sharpness` of a loss whose Hessian is at hand, which keeps its graph; arguments are those of `sharpness`.

    Raises:
        ArgumentError: ``start`` or ``blocks`` do not fit the model.
        TraceError: the loss cannot be differentiated twice.
    """
    sign = -1.0 if update is not None and update.ascends else 1.0
    own_operator = update is not None and not update.is_plain
    operator = Preconditioned(hessian, sign=sign)
    plain = _searched(operator, k, tol, start, last=not own_operator)
    refuse_wrong_products(hessian, plain.vectors[0])
    found = plain
    if update is not None and own_operator:
        operator = limiting(hessian, update)
        found = _searched(operator, k, tol, None)
    return Sharpness(
        values=plain.values,
        residuals=plain.residuals,
        converged=plain.converged,
        lowest=plain.lowest,
        lowest_residual=plain.lowest_residual,
        by_block=by_block(operator, found.vectors[0], blocks, own, tol),
        gauss_newton=np.array([sign * gauss_newton(hessian, v) for v in plain.vectors]),
        interval=_interval(hessian, plain.vectors[0]),
        n_products=hessian.n_products,
        loss=float("nan") if hessian.value is None else hessian.value,
        notes=_notes(hessian, plain, found, k, update),
        vector=plain.vectors[0],
        preconditioned=found.values,
        preconditioned_residuals=found.residuals,
        **_stability(update, float(found.values[0])),
    )


def _check(model: Any, k: int, tol: Any, start: Any, blocks: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module with parameters")
    if k < 1:
        raise ArgumentError(f"k={k}; give a whole number of at least 1")
    if not isinstance(start, Tensor | None):
        raise ArgumentTypeError(f"start is a {type(start).__name__}; expected a tensor, such as vector of a result")
    if start is not None and not (start.isfinite().all() and start.any()):
        raise ArgumentError("start is zero or not finite; give a direction, such as vector of an earlier result")
    if isinstance(blocks, str):
        raise ArgumentTypeError(f"blocks={blocks!r}; give a list of paths of modules, e.g. [{blocks!r}]")
    if tol is not None and not (isinstance(tol, float | int) and 0 < tol < 1):
        raise ArgumentError(f"tol={tol!r}; give a number between 0 and 1, or None for {_TOLERANCE:g}")


def _searched(operator: Preconditioned, k: int, tol: float, start: Tensor | None, *, last: bool = True) -> Eigenpairs:
    """The largest eigenvalues; after the last search that begins at the gradient, its values are let go of."""
    hessian = operator.hessian

    def first() -> Tensor:
        found = operator.start(hessian.seed) if start is None else _near(hessian, start)
        if last:
            hessian.forget_values()
        return found

    rows = rows_for(hessian.n, hessian.dtype.itemsize)
    found = largest(operator.matvec, hessian.n, k, tol=tol, start=first(), rows=rows, max_products=_MOST)
    if found.vectors.untyped_storage().nbytes() > found.vectors.nbytes:
        hessian.release()  # it is made again for what follows: with it the copy would be the most that is held at once
        found = replace(found, vectors=found.vectors.clone())
    return found


def _near(hessian: Hessian, start: Tensor) -> Tensor:
    if start.shape != (hessian.n,):
        raise ArgumentError(f"start has shape {tuple(start.shape)}; expected ({hessian.n},), one entry a parameter")
    drawn = hessian.random_direction(hessian.seed)
    given = start.detach().to(drawn)
    return drawn.mul_(DRAWN).add_(given / torch.linalg.vector_norm(given))


def _stability(update: Update | None, curvature: float) -> dict[str, Any]:
    if update is None:
        return dict.fromkeys(("method", "learning_rate", "threshold", "ratio", "largest_stable_lr"))
    found = Stability.of(update, curvature)
    return {"method": update.method, **{f.name: getattr(found, f.name) for f in fields(found)}}


def _interval(hessian: Hessian, v: Tensor) -> tuple[float, float] | None:
    """Student's interval of the mean of v^T H_b v over the batches b."""
    if len(hessian.batches) < 3:
        return None
    vectors = hessian.split(v)
    quotients = torch.zeros(len(hessian.batches), dtype=torch.float64)
    places = itertools.count(hessian.ranks.rank, hessian.ranks.count)

    def quotient(_: float, found: Gradient) -> None:
        image = torch.zeros_like(v)
        hessian.add(image, found.product(vectors), 1.0)
        quotients[next(places)] = v.double() @ image.double()

    hessian.each_gradient(quotient)
    found_by_all = hessian.ranks.sum(quotients).numpy()
    mean = float(found_by_all.mean())
    spread = float(found_by_all.std(ddof=1)) / math.sqrt(len(quotients))
    reach = float(student_factor(len(quotients), 0.95)) * spread
    return mean - reach, mean + reach


def _notes(
    hessian: Hessian,
    plain: Eigenpairs,
    limiting: Eigenpairs,
    k: int,
    update: Update | None,
) -> tuple[str, ...]:
    notes = []
    if not (plain.converged.all() and limiting.converged.all()):
        notes.append(f"not converged within {_MOST} products: values are lower bounds; residuals say how far")
    if max(plain.asymmetry, limiting.asymmetry) > _ASYMMETRIC:
        notes.append(
            "products with the Hessian are not symmetric: some operation has a wrong second derivative, such as a "
            "custom backward that cuts the graph; the values cannot be trusted"
        )
    if len(plain.values) < k:
        notes.append(f"there are only {len(plain.values)} parameters")
    if hessian.sum_of(hessian.draws):
        notes.append(
            "the model draws random numbers as it runs, such as masks of dropout: the curvature is that under one "
            f"draw, of seed {hessian.seed}"
        )
    if hessian.sum_of(hessian.attends):
        notes.append(
            "attention took its plain path: fused kernels have no second derivative; values differ by rounding"
        )
    if update is not None and update.idle:
        notes.append(f"{update.idle} tensors of parameters have had no gradient so far, and are held fixed here")
    left = sum(p.requires_grad for p in hessian.module.parameters()) - len(hessian.parameters)
    if update is not None and left > 0:
        notes.append(f"{left} tensors of parameters that require grad are not in the optimizer, and held fixed here")
    return tuple(notes)
