"""Sharpness followed through a training: a few products a measurement, each search begun where the last one ended."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.curvature.batches import Batch
from stabkit.curvature.blocks import by_block
from stabkit.curvature.hessian import Hessian, refuse_randomness
from stabkit.curvature.lanczos import DRAWN, Eigenpairs, largest
from stabkit.curvature.stability import FLOOR, Preconditioned, Stability, limiting
from stabkit.curvature.twin import Twin
from stabkit.curvature.updates import Update, read_update, trained_by
from stabkit.errors import ArgumentTypeError
from stabkit.results import Result
from stabkit.tracing.recording.randomness import unchanged_randomness
from stabkit.tracing.recording.wrappers import unwrap

WARM, COLD = 4, 40  # products of a search that goes on, and of one that begins
EVERY = 10  # so many measurements from one search that begins to the next
TRIED = 12  # updates of a trial: longer than a momentum of .9 remembers
_TOLERANCE = 1e-2
_ROWS = 8
_SECOND = 0.3  # of the start, the second vector: what is about to overtake the first is found by the first products


@dataclass(frozen=True)
class TrackedSharpness(Result):
    """The sharpness at one moment of a training.

    Attributes:
        sharpness: the largest eigenvalue of P^-1 (H + W), P the preconditioner of the optimizer and W its coupled
            weight decay: of the Hessian H itself for SGD. A lower bound, to the error of few products. Entries of P
            count as a tenth of their mean at least: those that are smaller follow what grows there.
        residual: norm of what the eigenvector lacks; the distance to some eigenvalue is at most that.
        threshold: the largest curvature at which updates stay bounded.
        ratio: of the two.
        learning_rate: the present rate, of the group with the largest one.
        largest_stable_lr: the rate at which the ratio is 1.
        loss: of the closure.
        block: the path of the module with the largest share of the eigenvector.
        share: that share.
        n_products: how many products it took.
        draws: whether the closure draws random numbers, such as masks of dropout: it is the sharpness under one draw,
            that of the seed.
        trial: losses of the closure before each of `TRIED` updates and after the last, made on copies of weights and
            optimizer; they end where one is not finite. Empty where none were tried.
    """

    sharpness: float
    residual: float
    threshold: float
    ratio: float
    learning_rate: float
    largest_stable_lr: float
    loss: float
    block: str
    share: float
    n_products: int
    draws: bool = False
    trial: tuple[float, ...] = ()


class SharpnessTracker:
    """Measures the sharpness of a loss at any moment of a training, by about 4 products each time.

    A search begins at the first two vectors of the one before, with a little drawn anew; every 10th one begins
    afresh, by chance, for what came up so near to the first that few products do not tell them apart.

    Args:
        model: as it is called, wrapped or not.
        closure: returns the loss of a fixed batch, on the graph and without ``backward``.
        optimizer: of the model's parameters.
        seed: of what the model draws.

    Raises:
        ArgumentTypeError: the closure cannot be called.

    Example:
        >>> model, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> tracker = SharpnessTracker(model, lambda: model(x).square().mean(), sgd)
        >>> round(tracker.measure().ratio, 3)
        0.5
    """

    def __init__(self, model: nn.Module, closure: Callable[[], Tensor], optimizer: Any, *, seed: int = 0) -> None:
        if not callable(closure):
            raise ArgumentTypeError(
                f"closure is a {type(closure).__name__}; expected a function that returns the loss of a fixed batch, "
                "e.g. closure=lambda: torch.nn.functional.cross_entropy(model(x), y)"
            )
        self._model, self._module = model, unwrap(model)
        self._batches = (Batch((), {}, lambda output: output, call=closure),)
        self._optimizer = optimizer
        self._seed = seed
        self._vectors: Tensor | None = None
        self._made = 0

    def measure(self, *, tried_from: float = math.inf, longest: float = math.inf) -> TrackedSharpness:
        """The sharpness now; model, optimizer and random state are left as they are.

        Call it between ``backward`` and the optimizer's step: Adam and its like then have a preconditioner before their
        first update.

        Args:
            tried_from: from which ratio on updates are tried on copies; always where a preconditioner is young.
            longest: what the gradients of trials are clipped to.

        Raises:
            ArgumentError: the loss is random, or the optimizer has no threshold, or no preconditioner yet.
            TraceError: the closure returns no scalar on the graph, or one that cannot be differentiated twice.
        """
        update = read_update(self._optimizer, self._module, first=True)
        with torch.inference_mode(False), unchanged_randomness(), _called_inside(self._model):
            hessian = Hessian(self._module, update.parameters, self._batches, self._seed)
            with hessian.casting.off():
                if not self._made:
                    refuse_randomness(hessian, keep=True)
                found = self._searched(hessian, update)
                stability = Stability.of(update, float(found.values[0]))
                hessian.release()
                tried = update.young or stability.ratio > tried_from
                trial = self._trial(hessian, 1.0, longest) if tried else ()
        self._made += 1
        v = found.vectors[0]
        block = by_block(Preconditioned(hessian), v, None, 0, _TOLERANCE)[0]
        return TrackedSharpness(
            sharpness=float(found.values[0]),
            residual=float(found.residuals[0]),
            **vars(stability),
            loss=float("nan") if hessian.value is None else hessian.value,
            block=block.name,
            share=block.share,
            n_products=found.n_products,
            draws=hessian.draws,
            trial=trial,
        )

    def tried(self, factor: float, longest: float = math.inf) -> tuple[float, ...]:
        """A trial of updates at so many times the rate, as of `TrackedSharpness`."""
        trained = trained_by(self._optimizer, self._module)
        with torch.inference_mode(False), unchanged_randomness(), _called_inside(self._model):
            hessian = Hessian(self._module, trained, self._batches, self._seed)
            with hessian.casting.off():
                return self._trial(hessian, factor, longest)

    def _trial(self, hessian: Hessian, factor: float, longest: float) -> tuple[float, ...]:
        return tuple(Twin(hessian, self._optimizer, factor, longest=longest).losses(TRIED))

    def _searched(self, hessian: Hessian, update: Update) -> Eigenpairs:
        kept = self._vectors
        if kept is not None and kept.shape[1] != hessian.n:
            kept = None
        afresh = kept is None or self._made % EVERY == 0
        operator = limiting(hessian, update, FLOOR)
        if kept is None or afresh:
            start = operator.start(self._seed + self._made)
        else:
            start = hessian.random_direction(self._seed + self._made)
            start.mul_(DRAWN).add_(kept[0])
            if len(kept) > 1:
                start.add_(kept[1], alpha=_SECOND)
        most = COLD if afresh else WARM
        hessian.forget_values()
        found = largest(
            operator.matvec, hessian.n, 1, tol=_TOLERANCE, start=start, rows=_ROWS, max_products=most, spare=1
        )
        self._vectors = found.vectors
        return found


@contextlib.contextmanager
def _called_inside(model: nn.Module) -> Iterator[None]:
    """Calls of a wrapper that spreads a model over devices or processes go to the model itself.

    They would wait for the other processes, and prepare a backward pass that does not come.
    """
    wrappers: list[nn.Module] = []
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            wrappers.append(model)
        model = inner
    try:
        for wrapper in wrappers:
            inner_call: Any = wrapper.module
            vars(wrapper)["forward"] = inner_call.__call__
        yield
    finally:
        for wrapper in wrappers:
            del vars(wrapper)["forward"]
