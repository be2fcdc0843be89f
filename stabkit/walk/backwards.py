"""One walk back through a flow: several cotangents in a batch, at every step rescaled, observed and drawn anew."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stabkit.tracing.products.step_products import Space
from stabkit.tracing.protocols import FlowLike, StepLike
from stabkit.walk.cotangents import Cotangents, balanced, drawn, stacked

Renewal = Literal["never", "together", "each"]

_BYTES = 2**29  # that the products of one batch may keep alive, about


@dataclass(frozen=True)
class Passage:
    """What one step did to the cotangents that arrived at its target.

    Attributes:
        step: the step.
        arriving: the cotangents of its target, as they were sent.
        leaving: what came back to its source.
        continued: what the walk goes on with: ``leaving``, or new random cotangents where nothing came back.
        growth: ``(batch, k)``, log of the norm of ``leaving`` over that of ``arriving``, nats.
        silent: ``(batch, k)``, where nothing of the first cotangents is left in ``continued``.
        restarted: whether nothing came back at all, so that every cotangent was drawn anew.
    """

    step: StepLike
    arriving: Cotangents
    leaving: Cotangents
    continued: Cotangents
    growth: Tensor
    silent: Tensor
    restarted: bool


class Observer:
    """Looks on at every step of a walk, and may send columns of its own through it; one that does neither.

    Attributes:
        width: the largest number of columns that `beside` returns.
    """

    width = 0

    def beside(self, step: StepLike) -> Tensor | None:
        """Columns ``(batch, m, j)`` to pull back through a step in the same batch, and no further."""
        return None

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        """Called after every step, the last one first, with what the columns of `beside` became."""


@dataclass(frozen=True)
class Walk:
    """How cotangents grew on their way back.

    Attributes:
        growth: ``(steps, batch, k)``, log of the norm before a step over that after it, nats; -inf where nothing came
            through, NaN where nothing arrived.
        log_norms: ``(states, batch, k)``, log of the norm at each state, in the units in which the cotangents came;
            -inf where nothing of them is left, also where others were drawn since.
        restarts: states at which all cotangents were drawn anew, ascending. Norms before and after such a state are
            not comparable.
    """

    growth: Tensor
    log_norms: Tensor
    restarts: tuple[int, ...]


def walk_back(
    flow: FlowLike,
    columns: Tensor,
    seeds: Sequence[int] = (),
    *,
    renewal: Renewal = "never",
    observers: Sequence[Observer] = (),
    powers: Tensor | None = None,
) -> Walk:
    """Pull cotangents of the last state back to the first, all of them through one batch of products a step.

    Before every step each column is brought to about unit size by a power of two. That is exact: growth is the same
    to the last bit in whatever power of two the loss is measured, and no product leaves the range of its dtype because
    of what came before it.

    Args:
        flow: a traced forward pass, or an iterated map.
        columns: cotangents of the last state, ``(batch, size, k)``; k may be 0 when only observers need products.
        seeds: one for each column; the index of a state is added for the numbers drawn anew at it.
        renewal: where random cotangents are drawn anew. ``"never"``; ``"together"`` for all columns at a state that
            nothing comes back to; ``"each"`` also for a single sample and column that has nothing left.
        observers: called at every step.
        powers: ``(batch, k)``, powers of two that were taken out of the columns on a way that this one goes on with.

    Example:
        >>> import torch, stabkit
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(layer.weight).data.mul_(0.5)
        >>> flow = stabkit.trace(torch.nn.Sequential(layer, torch.nn.Identity(), layer), torch.ones(1, 2))
        >>> walk_back(flow, torch.ones(1, 2, 1)).growth.sum(0)
        tensor([[-1.3863]], dtype=torch.float64)
    """
    count, k = len(flow), columns.shape[2]
    carried = balanced(columns, powers)
    growth = torch.empty(count, *carried.powers.shape, dtype=torch.float64)
    log_norms = torch.empty(count + 1, *carried.powers.shape, dtype=torch.float64)
    log_norms[count] = carried.log_norms
    silent = carried.gone
    if renewal == "each":
        carried = _renewed(carried, flow.space_at(count), [seed + count for seed in seeds])
    restarts: list[int] = []
    width = k + sum(observer.width for observer in observers)
    for index, pull in pulls(flow, width):
        step = flow.steps[index]
        space = flow.space_at(index)
        leaving, beside = _through(step, space, pull, carried, observers)
        growth[index] = carried.growth_to(leaving)
        continued, silent = leaving, silent | leaving.gone
        restarted = renewal != "never" and index > 0 and k > 0 and bool(silent.all())
        if restarted:
            continued = balanced(drawn(space, [seed + index for seed in seeds]))
            silent = continued.gone
            restarts.append(index)
        log_norms[index] = torch.where(silent, -torch.inf, continued.log_norms)
        if renewal == "each":
            continued = _renewed(continued, space, [seed + index for seed in seeds])
        passage = Passage(step, carried, leaving, continued, growth[index], silent, restarted)
        for observer, pulled in zip(observers, beside, strict=True):
            observer.passed(passage, pulled)
        carried = continued
    return Walk(growth, log_norms, tuple(reversed(restarts)))


def random_columns(flow: FlowLike, seeds: Sequence[int]) -> Tensor:
    """Standard normal cotangents of the last state, ``(batch, size, len(seeds))``."""
    space = space_at(flow, len(flow))
    return stacked(space, [flow.cotangent(seed=seed) for seed in seeds]) if seeds else drawn(space, ())


def loss_columns(flow: FlowLike, losses: Sequence[Any]) -> Tensor:
    """The gradients of some losses with respect to the last state, ``(batch, size, len(losses))``.

    Raises:
        TraceError: a loss is not a differentiable scalar of the output that the flow leads to.
    """
    return stacked(space_at(flow, len(flow)), [flow.cotangent(loss) for loss in losses])


def joined(walks: Sequence[Walk]) -> Walk:
    """Walks of different cotangents, which started anew at the same states, as one."""
    growth, log_norms = (torch.cat([getattr(walk, name) for walk in walks], 2) for name in ("growth", "log_norms"))
    return Walk(growth, log_norms, walks[0].restarts)


def space_at(flow: FlowLike, index: int) -> Space:
    """Flat coordinates of a state, without the state."""
    return flow.space_at(index)


def _renewed(cotangents: Cotangents, space: Space, seeds: Sequence[int]) -> Cotangents:
    """The same, with random columns for the samples that have nothing left: what lies before is measured too."""
    gone = cotangents.gone
    return cotangents.mixed(drawn(space, seeds), gone) if bool(gone.any()) else cotangents


def _through(
    step: StepLike,
    source: Space,
    pull: Callable[[Tensor], Tensor],
    carried: Cotangents,
    observers: Sequence[Observer],
) -> tuple[Cotangents, list[Tensor | None]]:
    """One batch of products: the cotangents of the walk, and what the observers send beside them."""
    extra = [observer.beside(step) for observer in observers]
    parts = [carried.columns, *(columns.to(carried.columns) for columns in extra if columns is not None)]
    parts = [part for part in parts if part.shape[2]]
    k = carried.columns.shape[2]
    if parts:
        # columns are rows in memory, and stay so
        sent = parts[0] if len(parts) == 1 else torch.cat([part.movedim(2, 0) for part in parts]).movedim(0, 2)
        pulled = _in_batches(step, pull, sent)
    else:
        pulled = drawn(source, ())
    ends = k
    beside: list[Tensor | None] = []
    for columns in extra:
        beside.append(None if columns is None else pulled[..., ends : ends + columns.shape[2]])
        ends += 0 if columns is None else columns.shape[2]
    return balanced(pulled[..., :k], carried.powers), beside


def _in_batches(step: StepLike, pull: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
    """J^T U, in as few batches as the memory for what is alive in between allows."""
    width = max(1, _BYTES // max(step.footprint(), 1))
    if columns.shape[2] <= width:
        return pull(columns)
    return torch.cat([pull(part) for part in torch.split(columns, width, dim=2)], dim=2)


def pulls(flow: FlowLike, count: int) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """The products J^T U of every step, from the last to the first; ``count`` is how many columns U will have."""
    with contextlib.closing(flow.tangents(max(count, 1), adjoint=True)) as pieces:  # type: ignore[type-var]
        for piece in pieces:
            if piece.multiply is not None:
                yield piece.steps.start, piece.multiply
            elif piece.dense is not None:
                for place in reversed(range(len(piece.steps))):
                    yield piece.steps[place], functools.partial(_transposed_product, piece.dense[place])


def _transposed_product(J: Tensor, columns: Tensor) -> Tensor:
    return J.mT @ columns.to(J)
